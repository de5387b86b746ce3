"""Whether an adapter passes the bars of `evaluation.gates`: pure, so that prepare can judge a reused adapter again."""

import math
from collections.abc import Iterable, Mapping, Sequence

from finetune_operator.api.evaluation import Gate
from finetune_operator.api.finetunestatus import EvaluationStatus, GateStatus

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def judge(
    gates: Iterable[Gate], base: Mapping[str, float], adapter: Mapping[str, float], lower: Sequence[str] = ()
) -> EvaluationStatus:
    """The evaluation with each gate's verdict; passed when all are, also when there are none.

    `lower`: metrics of tasks of which less is better.
    """
    less = {*LOWER_IS_BETTER, *lower}
    verdicts = [
        judge_gate(gate, base.get(gate.metric), adapter.get(gate.metric), gate.metric in less) for gate in gates
    ]
    return EvaluationStatus(
        base=dict(base),
        adapter=dict(adapter),
        lower_is_better=list(lower),
        gates=verdicts,
        passed=all(verdict.passed for verdict in verdicts),
    )


def judge_gate(gate: Gate, base: float | None, value: float | None, lower: bool) -> GateStatus:
    """One gate. A metric that was not measured, or is not a number, does not pass."""
    if value is None or not math.isfinite(value):
        measured = "was not measured" if value is None else f"is {value}"
        message = (
            f"{gate.metric} {measured}: set dataset.evaluation, or the task in evaluation.tasks that the gate names"
        )
        return GateStatus(metric=gate.metric, passed=False, base=base, message=message)
    checks: list[tuple[bool, str]] = []
    if gate.max is not None:
        checks.append((value <= gate.max, _compared(gate.metric, value, "<=", ">", gate.max, value <= gate.max)))
    if gate.min is not None:
        checks.append((value >= gate.min, _compared(gate.metric, value, ">=", "<", gate.min, value >= gate.min)))
    if gate.better_than_base:
        checks.append(_better_than_base(gate.metric, value, base, lower))
    passed = all(good for good, _ in checks)
    message = "; ".join(text for good, text in checks if good == passed)
    return GateStatus(metric=gate.metric, passed=passed, value=value, base=base, message=message)


def _better_than_base(metric: str, value: float, base: float | None, lower: bool) -> tuple[bool, str]:
    if base is None or not math.isfinite(base):
        return False, f"{metric} of the base model was not measured"
    good = value < base if lower else value > base
    text = _compared(metric, value, "<" if lower else ">", ">=" if lower else "<=", base, good)
    return good, f"{text} of the base model"


def _compared(metric: str, value: float, good_sign: str, bad_sign: str, bound: float, good: bool) -> str:
    return f"{metric} {value:.4g} {good_sign if good else bad_sign} {bound:.4g}"
