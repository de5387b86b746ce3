"""activeDeadline and budget: whether a run has used what it may, and when it will have."""

from __future__ import annotations

from finetune_operator.api.common import seconds
from finetune_operator.finetune.view import View


def exceeded(view: View) -> tuple[str, str] | None:
    """Reason and message of the limit that was reached, if one was."""
    deadline = view.parent.spec.active_deadline
    if deadline and (view.now - view.started).total_seconds() >= seconds(deadline):
        return "DeadlineExceeded", f"the run took longer than activeDeadline ({deadline})"
    hours, allowed = gpu_hours(view), allowed_gpu_hours(view)
    # Exports need no GPU: a run that used its budget up to train is not robbed of them.
    if allowed is not None and hours >= allowed and view.stage != "export":
        return "BudgetExceeded", f"the run used {hours:.2f} GPU-hours of the {allowed:.2f} that budget allows"
    return None


def seconds_left(view: View) -> float | None:
    """Until the first limit will be reached, if the run goes on as it does now."""
    left = []
    if view.parent.spec.active_deadline:
        left.append(seconds(view.parent.spec.active_deadline) - (view.now - view.started).total_seconds())
    allowed = allowed_gpu_hours(view)
    if allowed is not None and view.current is not None and view.current.gpus:
        left.append((allowed - gpu_hours(view)) * 3600 / (view.current.gpus * view.current.nodes))
    return max(min(left), 1.0) if left else None


def gpu_hours(view: View) -> float:
    """GPU time of the run so far, over all attempts."""
    live = view.current.gpu_seconds(view.now) if view.current is not None and view.run.finished_at is None else 0.0
    return (view.run.gpu_seconds + live) / 3600


def allowed_gpu_hours(view: View) -> float | None:
    """The tighter of maxGpuHours and maxCost, in GPU-hours."""
    budget = view.parent.spec.budget
    if budget is None:
        return None
    bounds = [budget.max_gpu_hours] if budget.max_gpu_hours is not None else []
    rate = price(view)
    if budget.max_cost is not None and rate:
        bounds.append(budget.max_cost / rate)
    return min(bounds, default=None)


def price(view: View) -> float | None:
    """Of one GPU for one hour: the object's own, or the chart's."""
    budget = view.parent.spec.budget
    if budget is not None and budget.price_per_gpu_hour is not None:
        return budget.price_per_gpu_hour
    return view.settings.price_per_gpu_hour
