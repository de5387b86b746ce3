"""The prepared dataset: Parquet shards, dataset.json with what is known about them, preview.json with one sample.

Columns are lists of int32. SFT: input_ids, labels (-100: not learned), seq_lengths (of the samples in the row, one when
not packed). DPO, ORPO, Reward: prompt_ids, chosen_ids, rejected_ids. KTO: prompt_ids, completion_ids, and label (bool).
Equal inputs give equal bytes: the digest of these files is the dataset's identity.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_trainer.data.pack import Rows
from finetune_trainer.data.spool import SpoolReader
from finetune_trainer.data.tokenizer import IGNORE, ModelTokenizer, Tokens

TOKENS_PER_SHARD = 1 << 22  # 32 MB before compression, held in memory a few times over
_ROWS_PER_GROUP = 4096


def write_rows(directory: Path, split: str, reader: SpoolReader, rows: Rows, lengths: np.ndarray) -> None:
    """Write packed rows as <split>-00000.parquet and so on. `lengths`: of every sample of the spool."""
    for number, shard in enumerate(_shards(rows, lengths)):
        tokens, row_tokens = reader.gather(shard.samples), shard.tokens(lengths)
        columns = {
            "input_ids": _lists(tokens.input_ids, row_tokens),
            "labels": _lists(tokens.labels, row_tokens),
            "seq_lengths": _lists(lengths[shard.samples], shard.counts),
        }
        _write_table(directory, split, number, columns)


def write_answers(
    directory: Path, split: str, reader: SpoolReader, rows: Rows, lengths: np.ndarray, good: np.ndarray | None
) -> None:
    """Write samples with a prompt and two answers (chosen, rejected), or with one (completion) and `good` as its
    label.
    """
    names = ("chosen_ids", "rejected_ids") if good is None else ("completion_ids",)
    for number, shard in enumerate(_shards(rows, lengths)):
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("prompt_ids", *names)}
        for index in shard.samples.tolist():
            sequences = reader.sequences(index)
            begin = answers_begin(sequences)
            parts["prompt_ids"].append(sequences[0].input_ids[:begin])
            for name, tokens in zip(names, sequences, strict=True):
                parts[name].append(tokens.input_ids[begin:])
        columns = {
            name: _lists(np.concatenate(values), np.array([len(value) for value in values]))
            for name, values in parts.items()
        }
        if good is not None:
            chosen = good[shard.samples]
            bits = pa.py_buffer(np.packbits(chosen, bitorder="little"))
            columns["label"] = pa.Array.from_buffers(pa.bool_(), len(chosen), [None, bits])
        _write_table(directory, split, number, columns)


def answers_begin(sequences: Sequence[Tokens]) -> int:
    """Where the answers of a sample begin: at the first learned token, or where the sequences part before it, because
    a prompt's last characters and an answer's first ones became one token (as in TRL)."""
    shortest = min(len(tokens.input_ids) for tokens in sequences)
    learned = min(int(np.argmax(tokens.labels != IGNORE)) for tokens in sequences)
    first = sequences[0].input_ids[:shortest]
    parted = [first != tokens.input_ids[:shortest] for tokens in sequences[1:]]
    return min([learned, *(int(np.argmax(apart)) for apart in parted if apart.any())])


def _write_table(directory: Path, split: str, number: int, columns: dict[str, pa.Array]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{split}-{number:05d}.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=_ROWS_PER_GROUP)


def _lists(values: np.ndarray, sizes: np.ndarray) -> pa.Array:
    """A column of lists from all their values one after the other and the size of each."""
    return pa.ListArray.from_arrays(_numbers(np.concatenate([[0], np.cumsum(sizes)])), _numbers(values))


def _numbers(values: np.ndarray) -> pa.Array:
    """An int32 array of Arrow. pa.array does the same, but imports pandas first, for a second."""
    buffer = pa.py_buffer(np.ascontiguousarray(values, dtype=np.int32))
    return pa.Array.from_buffers(pa.int32(), len(values), [None, buffer])


def _shards(rows: Rows, lengths: np.ndarray) -> Iterator[Rows]:
    """The rows in parts of about TOKENS_PER_SHARD tokens."""
    ends = np.cumsum(rows.tokens(lengths))
    start, done = 0, 0
    while start < len(rows):
        end = max(start + 1, int(np.searchsorted(ends, done + TOKENS_PER_SHARD, side="right")))
        yield rows.part(start, end)
        start, done = end, int(ends[end - 1])


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """How long samples are, in tokens: p50, p90, p99 and the longest."""
    if not len(lengths):
        return {}
    return {f"p{at}": int(np.percentile(lengths, at, method="lower")) for at in (50, 90, 99)} | {
        "max": int(lengths.max())
    }


def histogram(lengths: np.ndarray, bars: int = 24) -> dict[str, list[int]]:
    """How many samples have which length: counts[i] of them have edges[i] to edges[i + 1] - 1 tokens."""
    if not len(lengths):
        return {}
    width = int(lengths.max()) // bars + 1
    counts = np.bincount(lengths // width)
    return {"edges": [index * width for index in range(len(counts) + 1)], "counts": counts.tolist()}


def preview(tokens: Tokens, tokenizer: ModelTokenizer, limit: int = 2048) -> list[dict[str, Any]]:
    """One sample as the model sees it: pieces of text, each with whether it is learned."""
    ids, learned = tokens.input_ids[:limit], tokens.labels[:limit] != IGNORE
    edges = [0, *(np.flatnonzero(np.diff(learned.astype(np.int8))) + 1).tolist(), len(ids)]
    return [
        {"text": tokenizer.decode(ids[start:end]), "learned": bool(learned[start]), "tokens": end - start}
        for start, end in pairwise(edges)
        if end > start
    ]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
