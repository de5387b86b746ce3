"""Prepared rows for the training loop: read memory-mapped, ordered by seed alone, laid out without padding."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from finetune_trainer.failures import INVALID_DATASET, RunFailure

IGNORE = -100
IDS = pa.list_(pa.int32())


class Row(NamedTuple):
    """One prepared row: one sample, or several packed one after the other (int32 arrays of shape [tokens]).

    A row of two answers is two samples, chosen and rejected, each with the prompt. A judged answer has `good`, and in
    `mismatched` its prompt with another row's answer. `reference`: log probabilities by the base model (reference.py).
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    good: bool = True
    mismatched: "Row | None" = None
    reference: np.ndarray | None = None


class Rows:
    """All rows of one split, read from disk as they are used.

    Parquet has no random access, so it is rewritten once as an Arrow file, which is memory-mapped: a dataset of any
    size costs page cache only. `written`: another process on this node has done so. `reference`: one line of log
    probabilities per row, for objectives that compare with the base model.
    """

    reference: np.ndarray | None = None

    def __init__(self, folder: Path, split: str, scratch: Path, written: bool = False) -> None:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            raise RunFailure(INVALID_DATASET, f"prepared dataset has no {split}-*.parquet: run prepare again")
        arrow = scratch / f"{split}.arrow"
        names = set(pq.ParquetFile(files[0]).schema_arrow.names)
        schema, self._read = next(shape for shape in SHAPES if names >= set(shape[0].names))
        if not written:
            _write_arrow(files, arrow, schema)
        self.table = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all()
        self.columns = {name: self.table.column(name) for name in schema.names}

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Row:
        row = self._read(self, index)
        if int(row.lengths.sum()) != len(row.input_ids) or len(row.labels) != len(row.input_ids):
            raise RunFailure(INVALID_DATASET, f"prepared row {index}: seq_lengths, labels and input_ids disagree")
        return row if self.reference is None else row._replace(reference=self.reference[index])

    def ids(self, column: str, index: int) -> np.ndarray:
        values = self.columns[column][index].values
        # Not to_numpy(): that imports pandas, more than a second of every start.
        return np.frombuffer(values.buffers()[1], np.int32, len(values), values.offset * 4)

    @cached_property
    def longest_answered(self) -> int:
        """Tokens of the longest prompt with its answer, of judged answers."""
        sizes = pc.add(*(pc.list_value_length(self.columns[name]) for name in ("prompt_ids", "completion_ids")))
        return int(pc.max(sizes).as_py())


def _packed_row(rows: Rows, index: int) -> Row:
    return Row(rows.ids("input_ids", index), rows.ids("labels", index), rows.ids("seq_lengths", index))


def _pair_row(rows: Rows, index: int) -> Row:
    prompt, *answers = (rows.ids(name, index) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return answered(prompt, *answers)


def _judged_row(rows: Rows, index: int) -> Row:
    """Beside its own answer the row gets one that does not belong to it: that of the row before it with another prompt,
    cut so that it is no longer than what the model was prepared for."""
    prompt, answer = rows.ids("prompt_ids", index), rows.ids("completion_ids", index)
    others = ((index - back) % len(rows) for back in range(1, len(rows) + 1))
    other = next((at for at in others if not np.array_equal(rows.ids("prompt_ids", at), prompt)), index - 1)
    foreign = rows.ids("completion_ids", other)[: rows.longest_answered - len(prompt)]
    good = bool(rows.columns["label"][index].as_py())
    return answered(prompt, answer)._replace(good=good, mismatched=answered(prompt, foreign))


def answered(prompt: np.ndarray, *answers: np.ndarray) -> Row:
    """A row of one sample per answer, each the prompt and what is learned of it: the answer."""
    samples = [np.concatenate([prompt, answer]) for answer in answers]
    labels = [np.concatenate([np.full_like(prompt, IGNORE), answer]) for answer in answers]
    return Row(np.concatenate(samples), np.concatenate(labels), np.array([len(one) for one in samples], np.int32))


# What prepared.py writes for each kind of objective, and how a row of it is read.
SHAPES: tuple[tuple[pa.Schema, Callable[[Rows, int], Row]], ...] = (
    (pa.schema([("input_ids", IDS), ("labels", IDS), ("seq_lengths", IDS)]), _packed_row),
    (pa.schema([("prompt_ids", IDS), ("chosen_ids", IDS), ("rejected_ids", IDS)]), _pair_row),
    (pa.schema([("prompt_ids", IDS), ("completion_ids", IDS), ("label", pa.bool_())]), _judged_row),
)


def _write_arrow(files: list[Path], arrow: Path, schema: pa.Schema) -> None:
    arrow.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1024, columns=schema.names):
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))


def decoded_prompts(rows: Rows, model: Path, count: int = 3, tokens: int = 64) -> list[str]:
    """What stands before the first learned token of the first samples: prompts on which the adapter should differ."""
    from finetune_trainer.data.tokenizer import load_tokenizer

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
