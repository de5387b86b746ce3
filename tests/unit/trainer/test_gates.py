"""Gates: what passes, and what the message says."""

from typing import Any

import pytest

from finetune_operator.api.evaluation import Gate
from finetune_trainer.evaluation.gates import judge

BASE = {"loss": 2.0, "perplexity": 7.4, "token_accuracy": 0.4, "hellaswag/acc": 0.5}
ADAPTER = {"loss": 1.0, "perplexity": 2.7, "token_accuracy": 0.6, "hellaswag/acc": 0.4}


@pytest.mark.parametrize(
    ("gate", "passed", "message"),
    [
        ({"metric": "loss", "max": 1.2}, True, "loss 1 <= 1.2"),
        ({"metric": "loss", "max": 0.9}, False, "loss 1 > 0.9"),
        ({"metric": "token_accuracy", "min": 0.5}, True, "token_accuracy 0.6 >= 0.5"),
        ({"metric": "token_accuracy", "min": 0.7}, False, "token_accuracy 0.6 < 0.7"),
        ({"metric": "loss", "betterThanBase": True}, True, "loss 1 < 2 of the base model"),
        ({"metric": "token_accuracy", "betterThanBase": True}, True, "token_accuracy 0.6 > 0.4 of the base model"),
        ({"metric": "hellaswag/acc", "betterThanBase": True}, False, "hellaswag/acc 0.4 <= 0.5 of the base model"),
        ({"metric": "loss", "max": 1.2, "betterThanBase": True}, True, "loss 1 <= 1.2; loss 1 < 2 of the base model"),
        ({"metric": "loss", "max": 0.9, "betterThanBase": True}, False, "loss 1 > 0.9"),
    ],
)
def test_a_gate_passes_when_all_its_bars_are_cleared(gate: dict[str, Any], passed: bool, message: str) -> None:
    evaluation = judge([Gate.model_validate(gate)], BASE, ADAPTER)
    assert evaluation.passed is passed
    assert evaluation.gates[0].message == message


def test_without_gates_everything_passes() -> None:
    assert judge([], {}, {}).passed is True


@pytest.mark.parametrize("metrics", [{}, {"loss": float("nan")}])
def test_a_metric_that_was_not_measured_does_not_pass(metrics: dict[str, float]) -> None:
    evaluation = judge([Gate.model_validate({"metric": "loss", "max": 9})], {}, metrics)
    assert evaluation.passed is False
    assert "dataset.evaluation" in evaluation.gates[0].message


def test_better_than_base_needs_a_base() -> None:
    assert judge([Gate.model_validate({"metric": "loss", "betterThanBase": True})], {}, ADAPTER).passed is False
