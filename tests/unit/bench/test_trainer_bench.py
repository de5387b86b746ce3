"""What bench/trainer gives to all contestants, and how it judges them."""

import random
import sys
from pathlib import Path
from statistics import mean, median

import pytest

from bench.trainer.contestants import OUR_STEPS, TRAINER_STEPS
from bench.trainer.process import Failed, Signs, Trace, watch
from bench.trainer.results import Results
from bench.trainer.workload import MAX_LENGTH, Recipe, in_order_of_training, make_rows
from finetune_trainer.data.batches import batch_rows


def test_samples_are_as_long_as_instructions_are() -> None:
    rows = make_rows(2000)
    lengths = sorted(len((row["prompt"] + row["completion"]).split()) + 1 for row in rows)
    assert 118 < mean(lengths) < 132
    assert 92 < median(lengths) < 104
    assert lengths[-1] <= MAX_LENGTH
    assert make_rows(2000) == rows


def test_a_file_read_from_its_beginning_gives_the_batches_that_we_draw() -> None:
    rows, recipe = make_rows(50), Recipe(steps=3, batch_size=4)
    ordered = in_order_of_training(rows, recipe)
    assert ordered[4:8] == [rows[index] for index in batch_rows(1, 4, 50, recipe.seed)]
    assert len(ordered) == 50


@pytest.mark.parametrize(
    ("signs", "text", "steps"),
    [
        (TRAINER_STEPS, "{'loss': '10.37', 'grad_norm': '0.5'}\n{'train_runtime': '3', 'train_loss': '10.3'}", 1),
        (OUR_STEPS, "x INFO step 1: first step 3.1 s after\nx INFO step 3/5  epoch\nx INFO step 5/5  epoch", 2),
    ],
)
def test_steps_are_told_from_what_a_contestant_prints(signs: Signs, text: str, steps: int, tmp_path: Path) -> None:
    trace = watch([sys.executable, "-c", f"print({text!r})"], signs, {}, tmp_path / "log", 30)
    assert len(trace.steps) == steps
    assert trace.peak_bytes > 1 << 20


def test_a_contestant_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no CPU kernel"):
        watch([sys.executable, "-c", "exit('no CPU kernel')"], OUR_STEPS, {}, tmp_path / "log", 30)


def results(ours: float, plain: float, loss: float = 10.0) -> Results:
    """Rounds in which our loop takes `ours` seconds, that of the others `plain`."""
    found = Results(tokens=[100, 600])
    for name, seconds in {"finetune": ours, "plain loop": plain, "trl sft": plain}.items():
        losses = [loss if name == "trl sft" else 10.0] * 2
        for _ in range(3):
            noise = random.Random(1).uniform(0.99, 1.01)
            found.add(
                name,
                Trace(
                    ready=ours,
                    ready_cpu=ours,
                    steps=[seconds, 2 * seconds * noise],
                    cpu=[0, seconds],
                    losses=losses,
                    peak_bytes=1000,
                ),
            )
    return found


def test_speed_is_the_samples_tokens_after_the_first_step_over_its_seconds() -> None:
    assert results(5.0, 10.0).speed("finetune") == pytest.approx(100, rel=0.05)


def test_a_target_that_is_missed_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert results(5.0, 10.0).report(has_bf16=True) == 1
    assert "MISSED" in capsys.readouterr().out


def test_other_losses_are_not_the_same_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert not results(1.0, 10.0, loss=10.5).same_losses("trl sft")
    assert results(1.0, 10.0, loss=10.01).same_losses("trl sft")
    assert "DIFFERENT" in capsys.readouterr().out
