"""Checked samples into tokens: rendered here while the batch before is tokenized on the other cores."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.data.check import Checked, Problems, read_samples
from finetune_trainer.data.formats import Invalid, Judged, Sample
from finetune_trainer.data.notices import Notices
from finetune_trainer.data.rows import DataFile
from finetune_trainer.data.spool import Spool, content_hash
from finetune_trainer.data.tokenizer import IGNORE, ModelTokenizer, Rendered, Tokens
from finetune_trainer.failures import INVALID_DATASET, RunFailure

log = logging.getLogger(__name__)

BATCH = 512  # samples
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


class Batch(NamedTuple):
    """Rendered samples whose tokens are on their way: one Rendered for each sequence of each sample."""

    samples: list[tuple[str, Sample, list[Rendered]]]
    tokens: Future[list[Tokens]]


def collect(
    files: list[DataFile],
    spec: FineTuneSpec,
    tokenizer: ModelTokenizer,
    max_length: int,
    spool: Spool,
    limit: int | None,
) -> Figures:
    """All samples of some files into a spool. Every row is checked even after a bad one, so that the message counts
    them.
    """
    figures = Figures()
    reading = read_samples(files, spec.dataset, spec.objective.type, figures.invalid)
    figures.format = reading.form.name
    fail = spec.dataset.on_invalid_row == "Fail"
    notices = Notices(tokenizer.special_tokens)
    samples = islice(reading.samples, limit)
    reported = time.monotonic()
    waiting: Batch | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        while batch := list(islice(samples, BATCH)):
            rendered = _render(batch, spec, tokenizer, figures, notices)
            if waiting:
                _keep(waiting, spec, max_length, spool, figures)
                waiting = None
            if rendered and not (fail and figures.invalid.count):
                sequences = [one for _, _, parts in rendered for one in parts]
                waiting = Batch(rendered, pool.submit(tokenizer.encode, sequences))
            if time.monotonic() - reported > LOG_EVERY:
                reported = time.monotonic()
                rows = figures.checked + figures.invalid.count
                log.info("dataset: %d rows read, %d samples tokenized", rows, len(spool))
        if waiting:
            _keep(waiting, spec, max_length, spool, figures)
    notices.tell()
    if fail:
        figures.invalid.fail(figures.checked + figures.invalid.count)
    if figures.too_long.count:
        raise RunFailure(
            INVALID_DATASET,
            f"{figures.too_long.count} samples are longer than training.maxLength ({max_length} tokens); "
            "raise it, or set dataset.onTooLong: Truncate or Drop\n" + "\n".join(figures.too_long.first),
        )
    if not len(spool):
        shown = "\n".join(figures.invalid.first)
        raise RunFailure(
            INVALID_DATASET,
            f"no sample is left: {figures.invalid.count} rows invalid, {figures.dropped} too long\n{shown}".rstrip(),
        )
    return figures


def _render(
    batch: list[Checked], spec: FineTuneSpec, tokenizer: ModelTokenizer, figures: Figures, notices: Notices
) -> list[tuple[str, Sample, list[Rendered]]]:
    # answers are compared, so what comes before them is never learned
    loss_on = spec.training.loss_on if spec.objective.type == "SFT" else "Completion"
    rendered = []
    for place, sample in batch:
        try:
            sequences = tokenizer.render(sample, loss_on)
            rendered.append((place, sample, sequences))
            figures.checked += 1
            notices.look(place, sample, [one.text for one in sequences])
        except Invalid as invalid:
            figures.invalid.add(place, str(invalid))
    return rendered


def _keep(batch: Batch, spec: FineTuneSpec, max_length: int, spool: Spool, figures: Figures) -> None:
    """Put encoded samples into the spool, long ones as dataset.onTooLong says."""
    encoded = iter(batch.tokens.result())
    for place, sample, rendered in batch.samples:
        sequences = [next(encoded) for _ in rendered]
        if not all(_teaches(tokens) for tokens in sequences):
            figures.checked -= 1
            figures.invalid.add(
                place, "has nothing to learn: it is a single token, or the chat template prints no assistant turn"
            )
            continue
        longest = max(len(tokens.input_ids) for tokens in sequences)
        if longest > max_length:
            if spec.dataset.on_too_long == "Fail":
                figures.too_long.add(place, f"has {longest} tokens")
                continue
            sequences = [Tokens(tokens.input_ids[:max_length], tokens.labels[:max_length]) for tokens in sequences]
            if (
                spec.dataset.on_too_long == "Drop"
                or not all(_teaches(tokens) for tokens in sequences)
                or _equal(sequences)
            ):
                figures.dropped += 1  # cut before its answer begins, or before its answers part, it teaches nothing
                continue
            figures.truncated += 1
        good = sample.label if isinstance(sample, Judged) else True
        spool.add(sequences, content_hash([*(one.text for one in rendered), str(good)]), good)


def _equal(sequences: list[Tokens]) -> bool:
    first, *others = (tokens.input_ids for tokens in sequences)
    return any(np.array_equal(first, other) for other in others)


def _teaches(tokens: Tokens) -> bool:
    return bool((tokens.labels != IGNORE).any())
