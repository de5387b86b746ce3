"""The prepared dataset: Parquet shards of packed rows, dataset.json with what is known about them, preview.json with
one sample.

Columns, each a list of int32: input_ids; labels (-100: not learned); seq_lengths (of the samples in the row, one when
not packed). Equal inputs give equal bytes: the digest of these files is the dataset's identity.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_trainer.spool import SpoolReader
from finetune_trainer.tokenise import IGNORE, ModelTokenizer, Tokens

COLUMNS = ("input_ids", "labels", "seq_lengths")
SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])
TOKENS_PER_SHARD = 1 << 24  # 128 MB before compression, held in memory once
_ROWS_PER_GROUP = 4096


def write_rows(directory: Path, split: str, reader: SpoolReader, rows: list[list[int]], lengths: np.ndarray) -> int:
    """Write rows (lists of sample numbers) as <split>-00000.parquet...; returns the number of shards."""
    directory.mkdir(parents=True, exist_ok=True)
    count = 0
    for count, shard in enumerate(_shards(rows, lengths), start=1):
        path = directory / f"{split}-{count - 1:05d}.parquet"
        tokens = reader.gather([index for row in shard for index in row])
        samples = lengths[np.concatenate([np.asarray(row, np.int64) for row in shard])].astype(np.int32)
        per_row = np.array([len(row) for row in shard], np.int64)
        row_ends = np.cumsum(samples, dtype=np.int64)[np.cumsum(per_row) - 1]
        token_offsets = np.concatenate([[0], row_ends]).astype(np.int32)
        sample_offsets = np.concatenate([[0], np.cumsum(per_row)]).astype(np.int32)
        columns = [
            _lists(tokens.input_ids, token_offsets),
            _lists(tokens.labels, token_offsets),
            _lists(samples, sample_offsets),
        ]
        table = pa.Table.from_arrays(columns, schema=SCHEMA)
        pq.write_table(table, path, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    return count


def _lists(values: np.ndarray, offsets: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values)))


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


def token_count(lengths: np.ndarray, indices: Iterable[int]) -> int:
    return int(lengths[np.fromiter(indices, np.int64)].sum())
