"""Packing: short samples share one row, best fit first. What keeps them from seeing each other is `seq_lengths` in the
prepared data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Rows:
    """Which samples are in which row: sample numbers row after row, and how many of them each row has."""

    samples: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of each row. `lengths`: of every sample."""
        return np.add.reduceat(lengths[self.samples], np.cumsum(self.counts) - self.counts, dtype=np.int64)

    def part(self, start: int, end: int) -> Rows:
        """The rows from `start` to `end`."""
        edges = np.concatenate([[0], np.cumsum(self.counts)])
        return Rows(self.samples[edges[start] : edges[end]], self.counts[start:end])


def one_each(count: int) -> Rows:
    """Rows of one sample, when nothing is packed."""
    return Rows(np.arange(count), np.ones(count, np.int64))


def best_fit(lengths: np.ndarray, capacity: int) -> Rows:
    """Best-fit decreasing: every sample once, no row longer than `capacity`.

    The rows and the samples within them are in the order of their first sample, so that equal input gives equal rows. A
    sample that is longer than the capacity gets a row of its own. Linear: rows with room are found by a bit mask over
    the room that is left; only the rows that still have room cost Python objects.
    """
    row_of = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # row numbers by the room that they have left
    mask, count = 0, 0  # bit n is set when some row has exactly n tokens of room left
    for index, length in _longest_first(lengths):
        fitting = mask >> length
        if length <= capacity and fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                mask ^= 1 << room
            left = room - length
        else:
            row, left = count, max(capacity - length, 0)
            count += 1
        row_of[index] = row
        if left:
            with_room[left].append(row)
            mask |= 1 << left
    return _in_order(row_of, count)


def _longest_first(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        yield from zip(block.tolist(), lengths[block].tolist(), strict=True)


def _in_order(row_of: np.ndarray, count: int) -> Rows:
    """Rows sorted by their first sample, from the row number of each sample."""
    counts = np.bincount(row_of, minlength=count)
    firsts = np.argsort(row_of, kind="stable")[np.cumsum(counts) - counts]
    order = np.argsort(firsts)
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    return Rows(np.argsort(rank[row_of], kind="stable"), counts[order])
