"""The dataset in the making: files to checked samples, tokens, packed rows, and the figures that are reported about
them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.finetunestatus import DatasetStatus
from finetune_operator.api.method import Objective
from finetune_trainer import digest as digests
from finetune_trainer.data import pack, prepared
from finetune_trainer.data.collect import collect
from finetune_trainer.data.rows import DataFile
from finetune_trainer.data.spool import Spool, held_out
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.failures import BASE_MODEL_NOT_FOUND, INVALID_DATASET, RunFailure
from finetune_trainer.memory.architecture import read_config

log = logging.getLogger(__name__)

LOPSIDED = 0.5, 2.0  # times that all good answers may weigh what all bad ones do: the KTO paper recommends 1 to 4/3


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


class Split(NamedTuple):
    """The samples of a spool that belong to a split."""

    spool: Spool
    indices: np.ndarray


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
    with Spool(work / "spool-train") as spool:
        figures = collect(train_files, spec, tokenizer, max_length, spool, spec.dataset.max_samples)
    train, evaluation = Split(spool, np.arange(len(spool))), Split(spool, np.zeros(0, np.int64))
    if spec.dataset.evaluation is not None and spec.dataset.evaluation.fraction is not None:
        train, evaluation = _hold_out(spool, spec.dataset.evaluation.fraction, spec.training.seed)
    elif evaluation_files is not None:
        with Spool(work / "spool-evaluation") as held:
            found = collect(evaluation_files, spec, tokenizer, max_length, held, None)
        if found.invalid.count or found.dropped or found.truncated:
            log.warning(
                "dataset.evaluation: %d samples; %d rows skipped, %d too long, %d cut to %d tokens%s",
                len(held), found.invalid.count, found.dropped, found.truncated, max_length,
                "".join(f"\n{one}" for one in found.invalid.first),
            )  # fmt: skip
        evaluation = Split(held, np.arange(len(held)))
    for split in (train, evaluation):
        _check_vocabulary(split.spool, tokenizer, model)
    overlap = _overlap(train, evaluation)
    if spec.objective.type == "KTO":
        _check_labels(spool.good[train.indices], spec.objective)

    sft = spec.objective.type == "SFT"
    packing = sft and spec.training.packing in ("Enabled", "Auto")
    directory = work / "dataset"
    directory.mkdir(parents=True, exist_ok=True)
    rows = _write(directory, "train", train, spec, packing, max_length)
    evaluation_rows = _write(directory, "evaluation", evaluation, spec, packing, max_length)
    lengths = spool.lengths[train.indices]
    status = DatasetStatus(
        format=figures.format,
        samples=len(train.indices),
        evaluation_samples=len(evaluation.indices),
        tokens=int(lengths.sum()),
        truncated=figures.truncated,
        dropped=figures.dropped,
        skipped=figures.invalid.count,
        duplicates=len(spool) - len(np.unique(spool.hashes)),
    )
    learned = int(spool.learned[train.indices].sum())
    about = status.model_dump(by_alias=True, exclude={"digest", "uri", "tasks"}) | {
        "learnedTokens": learned,
        "lengths": prepared.percentiles(lengths),
        "histogram": prepared.histogram(lengths),
        "overlap": overlap,
        "maxLength": max_length,
        "packing": packing,
        "rows": rows,
        "evaluationRows": evaluation_rows,
        "lossOn": spec.training.loss_on,
        "tokenizerDigest": tokenizer.digest,
        "chatTemplate": _about_template(tokenizer),
    }
    if not tokenizer.has_own_template:  # goes with the adapter, so that it is served as it was trained
        (directory / "chat_template.jinja").write_text(tokenizer.template.source, encoding="utf-8")
    preview = prepared.preview(spool.reader().sequences(int(train.indices[0]))[0], tokenizer)
    prepared.write_json(directory / "dataset.json", about)
    prepared.write_json(directory / "preview.json", preview)
    log.info(
        "dataset: %s, %d samples (%d held out), %d tokens (%d learned) in %d rows; %d truncated, %d duplicates, lengths %s",
        status.format, status.samples, status.evaluation_samples, status.tokens, learned, rows,
        status.truncated, status.duplicates, about["lengths"],
    )  # fmt: skip
    longest_row = max_length if packing and rows < len(train.indices) else int(lengths.max())
    return Built(directory, status, rows, longest_row, learned / status.tokens, about, preview)


def longest(spec: FineTuneSpec, model: Path) -> int:
    """Tokens that a sample may have: training.maxLength, or the model's positions if they are fewer."""
    config = read_config(model)
    positions = config.get("max_position_embeddings") or config.get("n_positions") or spec.training.max_length
    if positions < spec.training.max_length:
        log.warning(
            "training.maxLength: the base model has %d positions, so samples are cut there, not at %d",
            positions,
            spec.training.max_length,
        )
    return int(min(spec.training.max_length, positions))


def _check_vocabulary(spool: Spool, tokenizer: ModelTokenizer, model: Path) -> None:
    """A token beyond the embeddings would stop a GPU in the middle of a step, without a word about the reason."""
    size, largest = read_config(model).get("vocab_size"), spool.reader().largest_id
    if size is not None and largest >= size:
        raise RunFailure(
            BASE_MODEL_NOT_FOUND,
            f"base model: its tokenizer makes {tokenizer.decode([largest])!r} token {largest}, but vocab_size in config.json "
            f"is {size}; put the tokenizer files of this very model into the folder",
        )


def _hold_out(spool: Spool, fraction: float, seed: int) -> tuple[Split, Split]:
    chosen = held_out(spool.hashes, fraction, seed)
    if not chosen.any():
        raise RunFailure(
            INVALID_DATASET, "dataset.evaluation.fraction needs at least two different rows; name a source instead"
        )
    return Split(spool, np.flatnonzero(~chosen)), Split(spool, np.flatnonzero(chosen))


def _check_labels(good: np.ndarray, objective: Objective) -> None:
    """KTO tells good answers from bad ones: it needs both, and works best when both weigh about the same."""
    share = float(good.mean())
    if share in (0.0, 1.0):
        raise RunFailure(
            INVALID_DATASET,
            f"objective.type KTO learns from good and bad answers, but label is {str(bool(share)).lower()} in all "
            f"{len(good)} rows; add rows with label {str(not share).lower()}",
        )
    desirable, undesirable = objective.desirable_weight or 1.0, objective.undesirable_weight or 1.0
    ratio = desirable * share / (undesirable * (1 - share))
    if not LOPSIDED[0] <= ratio <= LOPSIDED[1]:
        log.warning(
            "dataset: %.0f %% of the answers are good, so they weigh %.2g times what the bad ones do; for as much of each "
            "set objective.%sWeight to %.2g",
            100 * share, ratio, *(("desirable", desirable / ratio) if ratio < 1 else ("undesirable", undesirable * ratio)),
        )  # fmt: skip


def _overlap(train: Split, evaluation: Split) -> int:
    """How many evaluation samples are training samples too; none by construction when a fraction is held out."""
    learned = train.spool.hashes[train.indices]
    count = int(np.isin(evaluation.spool.hashes[evaluation.indices], learned).sum())
    if count:
        log.warning(
            "dataset: %d of %d evaluation samples are training samples too: their loss proves nothing",
            count, len(evaluation.indices),
        )  # fmt: skip
    return count


def _write(directory: Path, name: str, split: Split, spec: FineTuneSpec, packing: bool, max_length: int) -> int:
    """Write a split; returns the number of its rows."""
    indices, lengths = split.indices, split.spool.lengths
    if not len(indices):
        return 0
    reader = split.spool.reader()
    chosen = lengths[indices]
    rows = pack.best_fit(chosen, max_length) if packing else pack.one_each(len(chosen))
    rows = pack.Rows(indices[rows.samples], rows.counts)
    if spec.objective.type == "SFT":
        prepared.write_rows(directory, name, reader, rows, lengths)
    else:
        good = split.spool.good if spec.objective.type == "KTO" else None
        prepared.write_answers(directory, name, reader, rows, lengths, good)
    return len(rows)


def _about_template(tokenizer: ModelTokenizer) -> dict[str, str]:
    source = tokenizer.template.source
    origin = "model" if tokenizer.has_own_template else "default"
    return {"source": origin, "sha256": digests.sha256_hex(source.encode()), "text": source}
