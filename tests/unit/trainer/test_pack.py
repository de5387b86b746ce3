"""Packing: every sample once, no row too long, few rows, and the same rows each time."""

import numpy as np
import pytest

from finetune_trainer.data import pack


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    rows = pack.best_fit(lengths, capacity)
    parts = [rows.part(number, number + 1) for number in range(len(rows))]
    assert rows.tokens(lengths).tolist() == [lengths[part.samples].sum() for part in parts]
    return [part.samples.tolist() for part in parts]


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity = int(random.integers(8, 2048))
    lengths = random.integers(1, capacity + 1, int(random.integers(1, 500))).astype(np.int32)
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= capacity for row in rows)
    assert best_fit(lengths, capacity) == rows
    assert rows == sorted(rows)


def test_rows_are_nearly_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.7, 0.75, 20_000), 20, 512).astype(np.int32)
    rows = best_fit(lengths, 512)
    assert lengths.sum() / (512 * len(rows)) > 0.995


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert best_fit(np.array([6, 5, 4, 5]), 10) == [[0, 2], [1, 3]]


def test_a_sample_longer_than_a_row_has_one_of_its_own() -> None:
    assert best_fit(np.array([12, 3, 7]), 10) == [[0], [1, 2]]


def test_without_packing_a_row_is_a_sample() -> None:
    rows = pack.one_each(2)
    assert (rows.samples.tolist(), rows.counts.tolist()) == ([0, 1], [1, 1])
