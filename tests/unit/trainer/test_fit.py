"""The training loop on a model in memory: early stopping, checkpoints by step, epoch and time."""

import math
from pathlib import Path

import pytest
import torch

from finetune_trainer.memory.plan import Plan
from finetune_trainer.training.fit import CheckpointClock, evaluation_interval

from .small_run import Setup
from .tiny import finetune_spec


def test_early_stopping_ends_the_run_and_goes_back_to_the_best_weights(tmp_path: Path, tiny_llama: Path) -> None:
    spec = finetune_spec(training={"earlyStopping": {"patience": 2}}, checkpoint={"every": 1})
    fit = Setup(tmp_path, tiny_llama, spec).fit
    losses, seen = iter([3.0, 2.0, 2.5, 2.1, 0.5]), []

    def evaluate() -> float:
        seen.append({name: parameter.detach().clone() for name, parameter in fit.parameters.items()})
        return next(losses)

    assert fit.run(lambda snapshot: None, lambda: None, lambda: False, evaluate)
    assert fit.state.step == 4
    assert all(torch.equal(parameter, seen[1][name]) for name, parameter in fit.parameters.items())


def test_a_run_that_stopped_early_is_not_trained_on_by_its_next_attempt(tmp_path: Path, tiny_llama: Path) -> None:
    spec = finetune_spec(training={"earlyStopping": {"patience": 1}}, checkpoint={"every": 1})
    losses, saved = iter([3.0, 4.0]), []
    first = Setup(tmp_path / "first", tiny_llama, spec).fit
    assert first.run(
        lambda snapshot: saved.append(snapshot.on_cpu()), lambda: None, lambda: False, lambda: next(losses)
    )
    again = Setup(tmp_path / "again", tiny_llama, spec, snapshot=saved[-1]).fit
    assert again.run(saved.append, lambda: None, lambda: False, lambda: 0.0)
    assert again.state.step == 2
    assert all(torch.equal(parameter, again.parameters[name]) for name, parameter in first.parameters.items())


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path, tiny_llama: Path) -> None:
    spec = finetune_spec(training={"earlyStopping": {"patience": 2}}, checkpoint={"every": 1})
    fit, losses = Setup(tmp_path, tiny_llama, spec).fit, iter([math.nan, 3.0, math.nan, 4.0])
    assert fit.run(lambda snapshot: None, lambda: None, lambda: False, lambda: next(losses))
    assert (fit.state.step, fit.state.best_step, fit.state.best_loss) == (4, 2, 3.0)
    assert [line.get("evalLoss") for line in fit.state.metrics] == [None, 3.0, None, 4.0]


def test_an_interrupted_run_saves_a_checkpoint_and_says_that_it_is_not_done(tmp_path: Path, tiny_llama: Path) -> None:
    fit = Setup(tmp_path, tiny_llama, finetune_spec(checkpoint={"every": 1000})).fit
    saved: list[int] = []
    assert not fit.run(lambda snapshot: saved.append(snapshot.state.step), lambda: None, lambda: fit.state.step == 3)
    assert saved == [3]


@pytest.mark.parametrize("every", [2, "epoch", "10m"])
def test_checkpoints_are_due_by_step_epoch_or_time(every: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = CheckpointClock(every, Plan(steps=100, batch_size=4, micro_batch=4, rows=10), step=0)
    due = []
    for step in range(1, 7):
        now[0] += 250
        if clock(step):
            due.append(step)
    assert due == {2: [2, 4, 6], "epoch": [3, 5], "10m": [3, 6]}[every]


def test_early_stopping_never_depends_on_time() -> None:
    plan = Plan(steps=100, batch_size=4, micro_batch=4, rows=10)
    intervals = [evaluation_interval(finetune_spec(checkpoint={"every": every}), plan) for every in (7, "epoch", "10m")]
    assert intervals == [7, 3, 10]
