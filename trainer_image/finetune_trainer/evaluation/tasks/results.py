"""What lm-eval found of a task, as metrics that gates can name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from finetune_operator.api.evaluation import Gate

METRICS = 56  # of all tasks in status, which has room for 64


@dataclass(frozen=True)
class Score:
    """One metric of a task. `error`: its standard error; `lower`: less is better."""

    metric: str  # <task>/<metric>, as gates name it
    value: float
    error: float | None
    questions: int
    lower: bool


@dataclass(frozen=True)
class Comparison:
    """One metric of a task, of base model and adapter."""

    metric: str
    questions: int
    lower: bool
    base: float
    adapter: float
    base_error: float | None = None
    adapter_error: float | None = None


@dataclass(frozen=True)
class Measured:
    """All tasks' metrics. `digest`: of what was asked."""

    digest: str
    comparisons: list[Comparison] = field(default_factory=list)

    def kept(self, gates: Iterable[Gate]) -> list[Comparison]:
        """As many as status has room for, those that gates ask for first."""
        asked = {gate.metric for gate in gates}
        ordered = sorted(self.comparisons, key=lambda one: one.metric not in asked)
        kept = {one.metric for one in ordered[:METRICS]}
        return [one for one in self.comparisons if one.metric in kept]


def scores(task: str, found: Mapping[str, Any]) -> list[Score]:
    """A task's own metrics, or a group's, in lm-eval's order; the filter is named where a metric has several."""
    results, directions = found["results"][task], found["higher_is_better"].get(task, {})
    keys = [key for key in results if "," in key and not key.partition(",")[0].endswith("_stderr")]
    filters = Counter(key.partition(",")[0] for key in keys)
    told = []
    for key in keys:
        metric, _, filter_name = key.partition(",")
        value = results[key]
        if not isinstance(value, Real) or not math.isfinite(value):
            continue
        error = results.get(f"{metric}_stderr,{filter_name}")
        told.append(
            Score(
                metric=f"{task}/{key if filters[metric] > 1 else metric}",
                value=round(float(value), 6),
                error=round(float(error), 6) if isinstance(error, Real) and math.isfinite(error) else None,
                questions=int(results["sample_len"]),
                lower=directions.get(metric) is False,
            )
        )
    return told


def compared(base: Iterable[Score], adapter: Iterable[Score]) -> list[Comparison]:
    """The metrics that both have."""
    known = {score.metric: score for score in base}
    return [
        Comparison(
            metric=score.metric,
            questions=score.questions,
            lower=score.lower,
            base=known[score.metric].value,
            adapter=score.value,
            base_error=known[score.metric].error,
            adapter_error=score.error,
        )
        for score in adapter
        if score.metric in known
    ]
