"""The metrics of a run under the names that TensorBoard, MLflow and Weights & Biases show them by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from finetune_operator.api.finetunestatus import EvaluationStatus

LOSS = "train/loss"
# By the names in metrics.jsonl. The loss is last, so that a step whose loss has arrived has arrived as a whole.
TAGS = {
    "learningRate": "train/learning_rate",
    "gradNorm": "train/grad_norm",
    "tokens": "train/tokens",
    "tokensPerSecond": "train/tokens_per_second",
    "evalLoss": "eval/loss",
    "loss": LOSS,
}


def of_step(line: Mapping[str, Any]) -> dict[str, float]:
    """Of one line of metrics.jsonl."""
    return _finite({tag: line[name] for name, tag in TAGS.items() if line.get(name) is not None})


def of_evaluation(evaluation: EvaluationStatus | None) -> dict[str, float]:
    """Of adapter and base model on the held-out rows, once training has ended."""
    if evaluation is None:
        return {}
    adapter = {f"eval/{name}": value for name, value in evaluation.adapter.items()}
    return _finite(adapter | {f"base/{name}": value for name, value in evaluation.base.items()})


def _finite(values: dict[str, float]) -> dict[str, float]:
    """Without NaN and infinities, for which neither JSON nor a chart has a place."""
    return {tag: value for tag, value in values.items() if math.isfinite(value)}
