"""Packing: short samples share one row, best fit first. What keeps them from seeing each other is `seq_lengths` in the
prepared data.
"""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Sample indices per row: best-fit decreasing, every sample once, no row longer than `capacity`.

    The rows and the samples within them are in the order of their first sample, so that equal input gives equal rows. A
    sample that is longer than the capacity gets a row of its own. Linear: the rows with room are found by a bit mask
    over the room left.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # row numbers by the room that they have left
    mask = 0  # bit n is set when some row has exactly n tokens of room left
    for index in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[index])
        fitting = mask >> length
        if length <= capacity and fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                mask ^= 1 << room
            rows[row].append(index)
            left = room - length
        else:
            row, left = len(rows), max(capacity - length, 0)
            rows.append([index])
        if left:
            with_room[left].append(row)
            mask |= 1 << left
    return sorted(sorted(row) for row in rows)


def one_each(lengths: np.ndarray) -> list[list[int]]:
    """Rows of one sample, when nothing is packed."""
    return [[index] for index in range(len(lengths))]
