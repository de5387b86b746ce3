"""The dataset in the making: files to checked samples, tokens, packed rows, and the figures that are reported about
them.
"""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.finetunestatus import DatasetStatus
from finetune_trainer import digest as digests
from finetune_trainer import pack, prepared
from finetune_trainer.check import Checked, Problems, read_samples
from finetune_trainer.failures import INVALID_DATASET, RunFailure
from finetune_trainer.formats import Invalid
from finetune_trainer.rows import DataFile
from finetune_trainer.spool import Spool, SpoolReader, content_hash, held_out
from finetune_trainer.tokenise import IGNORE, ModelTokenizer, Rendered, Tokens

log = logging.getLogger(__name__)

BATCH = 512  # samples that are rendered here while the batch before is tokenized on the other cores
LOG_EVERY = 5.0


@dataclass
class Figures:
    """What was found in one source."""

    format: str = ""
    checked: int = 0
    truncated: int = 0
    dropped: int = 0
    invalid: Problems = field(default_factory=Problems)
    too_long: Problems = field(default_factory=Problems)


@dataclass(frozen=True)
class Built:
    """A prepared dataset in a folder. `rows`: of the training split, as batchSize counts them, the longest of them in
    tokens, and the share of the tokens that is learned. `about`: dataset.json.
    """

    directory: Path
    status: DatasetStatus
    rows: int
    longest_row: int
    learned: float
    about: dict[str, Any]
    preview: list[dict[str, Any]]


def build_dataset(
    spec: FineTuneSpec,
    train_files: list[DataFile],
    evaluation_files: list[DataFile] | None,
    tokenizer: ModelTokenizer,
    model: Path,
    work: Path,
) -> Built:
    """Read, check, tokenize, split, pack and write a dataset; InvalidDataset says what is wrong with it."""
    max_length = longest(spec, model)
    limit = spec.dataset.max_samples
    with Spool(work / "spool-train") as spool:
        figures = tokenize_files(train_files, spec, tokenizer, max_length, spool, limit)
    train = np.arange(len(spool))
    evaluation_reader, evaluation_spool, evaluation = spool.reader(), spool, np.zeros(0, np.int64)
    overlap = 0
    asked = spec.dataset.evaluation
    if asked is not None and asked.fraction is not None:
        chosen = held_out(spool.hashes, asked.fraction, spec.training.seed)
        if not chosen.any():
            raise RunFailure(
                INVALID_DATASET, "dataset.evaluation.fraction needs at least two different rows; name a source instead"
            )
        train, evaluation = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    elif evaluation_files is not None:
        with Spool(work / "spool-evaluation") as evaluation_spool:
            held = tokenize_files(evaluation_files, spec, tokenizer, max_length, evaluation_spool, None)
        if held.format != figures.format:
            raise RunFailure(
                INVALID_DATASET, f"dataset.evaluation has format {held.format}, dataset.train has {figures.format}"
            )
        evaluation_reader, evaluation = evaluation_spool.reader(), np.arange(len(evaluation_spool))
        overlap = int(np.isin(evaluation_spool.hashes, spool.hashes).sum())
        if overlap:
            log.warning(
                "dataset: %d of %d evaluation samples are training samples too: their loss proves nothing",
                overlap,
                len(evaluation),
            )

    packing = spec.training.packing == "Enabled" or (spec.training.packing == "Auto" and spec.objective.type == "SFT")
    directory = work / "dataset"
    reader = spool.reader()
    rows = _write(directory, "train", reader, train, spool.lengths, packing, max_length)
    evaluation_rows = _write(
        directory, "evaluation", evaluation_reader, evaluation, evaluation_spool.lengths, packing, max_length
    )
    lengths = spool.lengths[train]
    status = DatasetStatus(
        format=figures.format,
        samples=len(train),
        evaluation_samples=len(evaluation),
        tokens=int(lengths.sum()),
        truncated=figures.truncated,
        dropped=figures.dropped,
        skipped=figures.invalid.count,
        duplicates=len(spool) - len(np.unique(spool.hashes)),
    )
    about = status.model_dump(by_alias=True, exclude={"digest", "uri"}) | {
        "learnedTokens": int(spool.learned[train].sum()),
        "lengths": prepared.percentiles(lengths),
        "overlap": overlap,
        "maxLength": max_length,
        "packing": packing,
        "rows": rows,
        "evaluationRows": evaluation_rows,
        "lossOn": spec.training.loss_on,
        "tokenizerDigest": tokenizer.digest,
        "chatTemplate": {
            "source": "model" if tokenizer.has_own_template else "default",
            "sha256": digests.sha256_hex(tokenizer.template.source.encode()),
            "text": tokenizer.template.source,
        },
    }
    if not tokenizer.has_own_template:  # goes with the adapter, so that it is served as it was trained
        (directory / "chat_template.jinja").write_text(tokenizer.template.source, encoding="utf-8")
    prepared.write_json(directory / "dataset.json", about)
    preview = prepared.preview(reader.gather([int(train[0])]), tokenizer)
    prepared.write_json(directory / "preview.json", preview)
    log.info(
        "dataset: %s, %d samples (%d held out), %d tokens (%d learned) in %d rows; %d truncated, %d duplicates, "
        "lengths %s",
        status.format, status.samples, status.evaluation_samples, status.tokens, about["learnedTokens"], rows,
        status.truncated, status.duplicates, about["lengths"],
    )  # fmt: skip
    longest_row = max_length if packing and rows < len(train) else int(lengths.max())
    return Built(directory, status, rows, longest_row, about["learnedTokens"] / status.tokens, about, preview)


def longest(spec: FineTuneSpec, model: Path) -> int:
    """Tokens that a sample may have: training.maxLength, or the model's positions if they are fewer."""
    config = json.loads((model / "config.json").read_bytes())
    config = config.get("text_config") or config
    positions = config.get("max_position_embeddings") or config.get("n_positions") or spec.training.max_length
    if positions < spec.training.max_length:
        log.warning(
            "training.maxLength: the base model has %d positions, so samples are cut there, not at %d",
            positions,
            spec.training.max_length,
        )
    return int(min(spec.training.max_length, positions))


def tokenize_files(
    files: list[DataFile],
    spec: FineTuneSpec,
    tokenizer: ModelTokenizer,
    max_length: int,
    spool: Spool,
    limit: int | None,
) -> Figures:
    """All samples of some files into a spool. Every row is checked even after the first bad one, so that the message
    counts them.
    """
    figures = Figures()
    reading = read_samples(files, spec.dataset, spec.objective.type, figures.invalid)
    figures.format = reading.form.name
    fail = spec.dataset.on_invalid_row == "Fail"
    samples = islice(reading.samples, limit)
    reported = time.monotonic()
    waiting: tuple[list[str], list[Rendered], Future[list[Tokens]]] | None = None
    with ThreadPoolExecutor(max_workers=1) as tokenizing:
        while batch := list(islice(samples, BATCH)):
            figures.checked += len(batch)
            places, rendered = _render(batch, spec, tokenizer, figures)
            if waiting:
                _keep(*waiting, spec, max_length, spool, figures)
                waiting = None
            if rendered and not (fail and figures.invalid.count):
                waiting = places, rendered, tokenizing.submit(tokenizer.encode, rendered)
            if time.monotonic() - reported > LOG_EVERY:
                reported = time.monotonic()
                log.info(
                    "dataset: %d rows read, %d samples tokenized", figures.checked + figures.invalid.count, len(spool)
                )
        if waiting:
            _keep(*waiting, spec, max_length, spool, figures)
    if fail:
        figures.invalid.fail(figures.checked + figures.invalid.count)
    if figures.too_long.count:
        raise RunFailure(
            INVALID_DATASET,
            f"{figures.too_long.count} samples are longer than training.maxLength ({max_length} tokens); raise it, or "
            "set "
            "dataset.onTooLong: Truncate or Drop\n" + "\n".join(figures.too_long.first),
        )
    if not len(spool):
        shown = "\n".join(figures.invalid.first)
        raise RunFailure(
            INVALID_DATASET,
            f"no sample is left: {figures.invalid.count} rows invalid, {figures.dropped} too long\n{shown}".rstrip(),
        )
    return figures


def _render(
    batch: list[Checked], spec: FineTuneSpec, tokenizer: ModelTokenizer, figures: Figures
) -> tuple[list[str], list[Rendered]]:
    places: list[str] = []
    rendered: list[Rendered] = []
    for place, sample in batch:
        try:
            one = tokenizer.render(sample, spec.training.loss_on)
        except Invalid as invalid:
            figures.checked -= 1
            figures.invalid.add(place, str(invalid))
            continue
        places.append(place)
        rendered += one
    return places, rendered


def _keep(
    places: list[str],
    rendered: list[Rendered],
    encoded: Future[list[Tokens]],
    spec: FineTuneSpec,
    max_length: int,
    spool: Spool,
    figures: Figures,
) -> None:
    """Put encoded samples into the spool, long ones as dataset.onTooLong says."""
    for place, one, tokens in zip(places, rendered, encoded.result(), strict=True):
        length = len(tokens.input_ids)
        if not (tokens.labels != IGNORE).any():
            figures.checked -= 1
            figures.invalid.add(
                place, "has nothing to learn: it is a single token, or the chat template prints no assistant turn"
            )
            continue
        if length > max_length:
            if spec.dataset.on_too_long == "Fail":
                figures.too_long.add(place, f"has {length} tokens")
                continue
            tokens = Tokens(tokens.input_ids[:max_length], tokens.labels[:max_length])
            if spec.dataset.on_too_long == "Drop" or not (tokens.labels != IGNORE).any():
                figures.dropped += 1  # cut before its answer begins, a sample teaches nothing
                continue
            figures.truncated += 1
        spool.add(tokens, content_hash([one.text]))


def _write(
    directory: Path,
    split: str,
    reader: SpoolReader,
    indices: np.ndarray,
    lengths: np.ndarray,
    packing: bool,
    max_length: int,
) -> int:
    if not len(indices):
        return 0
    chosen = lengths[indices]
    rows = pack.best_fit(chosen, max_length) if packing else pack.one_each(chosen)
    prepared.write_rows(directory, split, reader, [indices[row].tolist() for row in rows], lengths)
    return len(rows)
