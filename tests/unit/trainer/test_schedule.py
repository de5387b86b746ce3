"""Steps, order of rows, micro batches and learning rates: pure functions."""

import math

import pytest
import torch

from finetune_trainer.command.importing.common import SCHEDULERS
from finetune_trainer.data.batches import batch_rows
from finetune_trainer.training.schedule import (
    learning_rate_factor,
    micro_batches,
    rows_of_rank,
    total_steps,
    warmup_steps,
)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "max_steps", "steps"),
    [
        (100, 16, 1.0, None, 7),
        (100, 10, 3.0, None, 30),
        (100, 16, 0.5, None, 4),
        (3, 16, 1.0, None, 1),
        (100, 16, None, 5, 5),
    ],
)
def test_the_steps_of_a_run(rows: int, batch: int, epochs: float | None, max_steps: int | None, steps: int) -> None:
    assert total_steps(rows, batch, epochs, max_steps) == steps


def test_every_step_has_exactly_the_effective_batch_and_every_epoch_all_rows() -> None:
    batches = [batch_rows(step, 4, 10, seed=1) for step in range(10)]
    assert {len(batch) for batch in batches} == {4}
    stream = [row for batch in batches for row in batch]
    for epoch in range(4):
        assert sorted(stream[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]


def test_the_order_depends_on_the_seed_alone() -> None:
    assert batch_rows(7, 4, 10, seed=1) == batch_rows(7, 4, 10, seed=1)
    assert batch_rows(0, 8, 10, seed=1) != batch_rows(0, 8, 10, seed=2)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 16, 100])
def test_micro_batches_hold_all_rows_and_no_more_than_they_may(micro_batch: int) -> None:
    parts = micro_batches(list(range(10)), micro_batch)
    assert [row for part in parts for row in part] == list(range(10))
    assert max(map(len, parts)) <= micro_batch
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_micro_batches_of_one(processes: int) -> None:
    batch = list(range(16))
    shares = [micro_batches(rows_of_rank(batch, rank, processes), 2) for rank in range(processes)]
    assert [chunk for share in shares for chunk in share] == micro_batches(batch, 2)
    assert len({len(share) for share in shares}) == 1


def test_processes_share_rows_that_cannot_be_shared_evenly_without_overlap() -> None:
    assert [rows_of_rank(list(range(7)), rank, 3) for rank in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [rows_of_rank([5], rank, 2) for rank in range(2)] == [[5], []]


@pytest.mark.parametrize(
    "scheduler",
    ["Linear", "Cosine", "CosineWithRestarts", "Polynomial", "Constant", "ConstantWithWarmup", "InverseSqrt"],
)
def test_every_scheduler_rises_once_and_stays_between_zero_and_one(scheduler: str) -> None:
    warmup = warmup_steps(100, 0.1)
    factors = [learning_rate_factor(scheduler, step, 100, warmup) for step in range(100)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[0] == (1.0 if scheduler == "Constant" else pytest.approx(0.1))
    assert factors[10] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"inverse_sqrt"}))
def test_an_imported_schedule_is_the_curve_that_transformers_has_under_that_name(name: str) -> None:
    from transformers import get_scheduler

    warmup, steps = 10, 100
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, 0 if name == "constant" else warmup, steps)
    for step in range(steps):
        if step >= warmup:
            ours = learning_rate_factor(SCHEDULERS[name], step, steps, warmup, restarts=3)
            assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        theirs.step()


def test_cosine_and_linear_end_near_zero() -> None:
    assert learning_rate_factor("Linear", 99, 100, 0) == pytest.approx(0.01)
    assert learning_rate_factor("Cosine", 50, 100, 0) == pytest.approx(0.5)
    assert learning_rate_factor("CosineWithRestarts", 50, 100, 0, restarts=2) == pytest.approx(1.0)
    assert learning_rate_factor("InverseSqrt", 39, 100, 10) == pytest.approx(math.sqrt(10 / 40))
