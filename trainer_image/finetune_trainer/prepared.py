"""The prepared dataset: Parquet shards, dataset.json with what is known about them, preview.json with one sample.

Columns are lists of int32. SFT: input_ids, labels (-100: not learned), seq_lengths (of the samples in the row, one when
not packed). DPO, ORPO, Reward: prompt_ids, chosen_ids, rejected_ids. KTO: prompt_ids, completion_ids, and label (bool).
Equal inputs give equal bytes: the digest of these files is the dataset's identity.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_trainer.spool import SpoolReader
from finetune_trainer.tokenizer import IGNORE, ModelTokenizer, Tokens

TOKENS_PER_SHARD = 1 << 24  # 128 MB before compression, held in memory once
_ROWS_PER_GROUP = 4096


def write_rows(directory: Path, split: str, reader: SpoolReader, rows: list[list[int]], lengths: np.ndarray) -> None:
    """Write rows (lists of sample numbers) as <split>-00000.parquet and so on."""
    for number, shard in enumerate(_shards(rows, lengths)):
        tokens = reader.gather([index for row in shard for index in row])
        samples = lengths[np.concatenate([np.asarray(row, np.int64) for row in shard])].astype(np.int32)
        per_row = np.array([len(row) for row in shard], np.int64)
        per_row_tokens = np.add.reduceat(samples, np.cumsum(per_row) - per_row, dtype=np.int64)
        columns = {
            "input_ids": _lists(tokens.input_ids, per_row_tokens),
            "labels": _lists(tokens.labels, per_row_tokens),
            "seq_lengths": _lists(samples, per_row),
        }
        _write_table(directory, split, number, columns)


def write_answers(
    directory: Path,
    split: str,
    reader: SpoolReader,
    indices: list[int],
    spool_lengths: np.ndarray,
    good: np.ndarray | None,
) -> None:
    """Write samples with a prompt and two answers (chosen, rejected), or with one (completion) and `good` as its label."""
    names = ("chosen_ids", "rejected_ids") if good is None else ("completion_ids",)
    for number, shard in enumerate(_shards([[index] for index in indices], spool_lengths)):
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("prompt_ids", *names)}
        for (index,) in shard:
            sequences = reader.sequences(index)
            for name, tokens in zip(names, sequences, strict=True):
                begins = int(np.argmax(tokens.labels != IGNORE))
                parts[name].append(tokens.input_ids[begins:])
            first = sequences[0]
            parts["prompt_ids"].append(first.input_ids[: int(np.argmax(first.labels != IGNORE))])
        columns = {
            name: _lists(np.concatenate(values), np.array([len(value) for value in values]))
            for name, values in parts.items()
        }
        if good is not None:
            columns["label"] = pa.array(good[[index for (index,) in shard]])
        _write_table(directory, split, number, columns)


def _write_table(directory: Path, split: str, number: int, columns: dict[str, pa.Array]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{split}-{number:05d}.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=_ROWS_PER_GROUP)


def _lists(values: np.ndarray, sizes: np.ndarray) -> pa.Array:
    """A column of lists from all their values one after the other and the size of each."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values, dtype=np.int32)))


def _shards(rows: list[list[int]], lengths: np.ndarray) -> Iterator[list[list[int]]]:
    shard: list[list[int]] = []
    tokens = 0
    for row in rows:
        size = int(lengths[row].sum())
        if shard and tokens + size > TOKENS_PER_SHARD:
            yield shard
            shard, tokens = [], 0
        shard.append(row)
        tokens += size
    if shard:
        yield shard


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """How long samples are, in tokens: p50, p90, p99 and the longest."""
    if not len(lengths):
        return {}
    return {f"p{at}": int(np.percentile(lengths, at, method="lower")) for at in (50, 90, 99)} | {
        "max": int(lengths.max())
    }


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
