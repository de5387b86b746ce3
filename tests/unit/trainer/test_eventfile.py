"""TensorBoard's event file, read back by TensorBoard."""

from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api.finetunestatus import EvaluationStatus
from finetune_trainer.results.eventfile import event_file

METRICS: list[dict[str, Any]] = [
    {
        "step": step, "loss": 2.0 / step, "learningRate": 1e-4, "gradNorm": 0.5, "tokens": 900 * step,
        "tokensPerSecond": 450.0, "time": 1.7e9 + step,
    }
    for step in (1, 2, 300)
]  # fmt: skip


def read(data: bytes, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: (step, value)} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder / "events.out.tfevents.0.finetune").write_bytes(data)
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_every_metric_of_every_step_is_in_it(tmp_path: Path) -> None:
    shown = read(event_file([*METRICS[:2], {**METRICS[2], "evalLoss": 1.25}], None), tmp_path)
    assert shown.keys() == {
        "train/loss", "train/learning_rate", "train/grad_norm", "train/tokens", "train/tokens_per_second", "eval/loss",
    }  # fmt: skip
    assert shown["train/loss"] == [(1, 2.0), (2, 1.0), (300, pytest.approx(2 / 300))]
    assert shown["train/tokens"][-1] == (300, 270_000)
    assert shown["eval/loss"] == [(300, 1.25)]


def test_the_final_evaluation_stands_at_the_last_step(tmp_path: Path) -> None:
    evaluation = EvaluationStatus(adapter={"loss": 1.5, "perplexity": 4.5}, base={"loss": 3.0})
    shown = read(event_file(METRICS, evaluation), tmp_path)
    assert (shown["eval/loss"], shown["eval/perplexity"], shown["base/loss"]) == (
        [(300, 1.5)],
        [(300, 4.5)],
        [(300, 3.0)],
    )


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    shown = read(event_file([METRICS[0], {**METRICS[1], "gradNorm": float("inf")}], None), tmp_path)
    assert [step for step, _ in shown["train/grad_norm"]] == [1]


def test_a_run_without_a_step_is_a_file_too(tmp_path: Path) -> None:
    assert read(event_file([], EvaluationStatus(adapter={"loss": 1.0})), tmp_path) == {}
