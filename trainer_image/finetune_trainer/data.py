"""Prepared rows for the training loop: read memory-mapped, ordered by seed alone, laid out without padding."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from finetune_trainer.failures import INVALID_DATASET, RunFailure

IGNORE = -100
COLUMNS = ["input_ids", "labels", "seq_lengths"]


class Row(NamedTuple):
    """One prepared row: one sample, or several packed one after the other (int32 arrays of shape [tokens])."""

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class Rows:
    """All rows of one split, read from disk as they are used.

    Parquet has no random access, so it is rewritten once as an Arrow file, which is memory-mapped: a dataset of any
    size costs page cache only. `written`: another process on this node has done so.
    """

    def __init__(self, folder: Path, split: str, scratch: Path, written: bool = False) -> None:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            raise RunFailure(INVALID_DATASET, f"prepared dataset has no {split}-*.parquet: run prepare again")
        arrow = scratch / f"{split}.arrow"
        if not written:
            _write_arrow(files, arrow)
        self.table = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all()
        self.columns = [self.table.column(name) for name in COLUMNS]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Row:
        row = Row(*(column[index].values.to_numpy(zero_copy_only=False) for column in self.columns))
        if int(row.lengths.sum()) != len(row.input_ids) or len(row.labels) != len(row.input_ids):
            raise RunFailure(INVALID_DATASET, f"prepared row {index}: seq_lengths, labels and input_ids disagree")
        return row


def _write_arrow(files: list[Path], arrow: Path) -> None:
    arrow.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1024, columns=COLUMNS):
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))


def decoded_prompts(rows: Rows, model: Path, count: int = 3, tokens: int = 64) -> list[str]:
    """What stands before the first learned token of the first samples: prompts on which the adapter should differ."""
    from finetune_trainer.tokenizer import load_tokenizer

    prompts = []
    for index in range(min(count, len(rows))):
        ids, targets = next(samples(rows[index]))
        learned = np.flatnonzero(targets != IGNORE)
        end = int(learned[0]) + 1 if len(learned) else len(ids)
        prompts.append(ids[:end][-tokens:].tolist())
    tokenizer = load_tokenizer(model)
    return [tokenizer.decode(prompt) for prompt in prompts]


def batch_rows(step: int, batch_size: int, rows: int, seed: int) -> list[int]:
    """The rows of optimizer step `step` (0-based): the next `batch_size` of an endless stream of shuffled epochs.

    A pure function: the order depends on nothing but the seed, so a resumed run sees the rows that were next.
    """
    start = step * batch_size
    picked: list[int] = []
    while len(picked) < batch_size:
        epoch, offset = divmod(start + len(picked), rows)
        order = _epoch_order(epoch, rows, seed)
        picked += order[offset : offset + batch_size - len(picked)].tolist()
    return picked


def _epoch_order(epoch: int, rows: int, seed: int) -> np.ndarray:
    key = (epoch, rows, seed)
    if key not in _ORDERS:
        _ORDERS.clear()  # one epoch at a time: 8 bytes a row
        _ORDERS[key] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
    return _ORDERS[key]


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes. `targets` are the labels shifted by one: what is to be predicted at each position."""

    input_ids: torch.Tensor  # [n, T]
    position_ids: torch.Tensor  # [n, T]
    targets: torch.Tensor  # [n, T], IGNORE where nothing is learned
    attention_mask: torch.Tensor | None  # [n, T], only in the padded layout
    lengths: tuple[int, ...]  # of the samples
    tokens: int
    target_tokens: int

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(
            move(self.input_ids),
            move(self.position_ids),
            move(self.targets),
            None if self.attention_mask is None else move(self.attention_mask),
            self.lengths,
            self.tokens,
            self.target_tokens,
        )


def shifted(labels: np.ndarray) -> np.ndarray:
    """Labels of one sample -> targets: position t is to predict token t+1, the last one nothing."""
    return np.append(labels[1:], IGNORE)


def samples(row: Row) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The (input_ids, targets) of each sample in a row."""
    edges = np.append(0, np.cumsum(row.lengths))
    for start, end in pairwise(edges):
        yield row.input_ids[start:end], shifted(row.labels[start:end])


def flat(rows: list[Row]) -> Batch:
    """All samples of all rows one after the other, as one row without padding; positions restart at each sample.

    Needs an attention that keeps samples apart (attention.py).
    """
    parts = [sample for row in rows for sample in samples(row)]
    lengths = tuple(len(ids) for ids, _ in parts)
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in parts]).astype(np.int64))
    targets = torch.from_numpy(np.concatenate([targets for _, targets in parts]).astype(np.int64))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(ids[None], positions[None], targets[None], None, lengths, len(ids), int((targets != IGNORE).sum()))


def padded(rows: list[Row]) -> Batch:
    """One sample per row, padded on the right: for models whose attention we cannot split, slower and exact."""
    parts = [sample for row in rows for sample in samples(row)]
    lengths = tuple(len(ids) for ids, _ in parts)
    ids = torch.zeros(len(parts), max(lengths), dtype=torch.int64)
    targets = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for i, (sample_ids, sample_targets) in enumerate(parts):
        ids[i, : lengths[i]] = torch.from_numpy(sample_ids.astype(np.int64))
        targets[i, : lengths[i]] = torch.from_numpy(sample_targets.astype(np.int64))
        mask[i, : lengths[i]] = 1
    positions = torch.arange(max(lengths)).expand(len(parts), -1)
    return Batch(ids, positions, targets, mask, lengths, sum(lengths), int((targets != IGNORE).sum()))


LAYOUTS = {"flat": flat, "padded": padded}


def batches(rows: Rows, micro_batch: int, layout: str, device: torch.device) -> Iterator[Batch]:
    """All rows in their order, `micro_batch` of them at a time."""
    for start in range(0, len(rows), micro_batch):
        picked = [rows[index] for index in range(start, min(start + micro_batch, len(rows)))]
        yield LAYOUTS[layout](picked).to(device)
