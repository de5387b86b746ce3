"""What the status says: everything that follows from phase, run and results, each as one small decision."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any, Literal

from finetune_operator import times
from finetune_operator.api.common import Condition
from finetune_operator.api.finetunestatus import (
    CostStatus,
    FineTuneStatus,
    FineTuneSummary,
    HistoryEntry,
    ProgressStatus,
    RunStatus,
)
from finetune_operator.finetune import exports, limits
from finetune_operator.finetune.view import View
from finetune_operator.reasons import WAITING, with_hint

HISTORY_KEPT = 10
EVALUATED = ("Exporting", "Succeeded")

# type-free part of a condition: status, reason, message
Verdict = tuple[Literal["True", "False", "Unknown"], str, str]


def complete(view: View, status: FineTuneStatus) -> FineTuneStatus:
    """The status with conditions, cost and summary that belong to it."""
    known = status.model_copy(
        update={"observed_generation": view.parent.metadata.generation, "cost": _cost(view, status)}
    )
    return known.model_copy(update={"conditions": conditions(view, known), "summary": summary(known)})


def underway(view: View) -> FineTuneStatus:
    """The status while the current attempt waits or runs."""
    known, attempt = _underway(view), view.current
    if attempt is None or attempt.state != "Running" or not attempt.waits_for:
        return known
    # The phase stays: training goes on beside an upload that waits.
    message = with_hint(attempt.waits_for, WAITING["StorageUnavailable"])
    return known.model_copy(update={"reason": "StorageUnavailable", "message": message})


def _underway(view: View) -> FineTuneStatus:
    attempt, run, base = view.current, view.run, view.status
    if attempt is None:
        return base
    run = run.model_copy(update={"micro_batch": attempt.micro_batch or run.micro_batch})
    if attempt.state == "Waiting":
        phase = {"prepare": "Preparing", "train": "Queued", "export": "Exporting"}[attempt.stage]
        message = with_hint(attempt.message, WAITING.get(attempt.reason, ""))
        return base.model_copy(update={"phase": phase, "run": run, "reason": attempt.reason, "message": message})
    if attempt.stage == "prepare":
        text = "data and base model are read, checked and prepared, on a CPU"
        return base.model_copy(update={"phase": "Preparing", "run": run, "reason": "Preparing", "message": text})
    if attempt.stage == "export":
        text = f"{exports.names(view.parent.spec)}: made from the adapter in Job {run.job_name}, on a CPU"
        return base.model_copy(update={"phase": "Exporting", "run": run, "reason": "Exporting", "message": text})
    progress = _progress(base.progress or ProgressStatus(), attempt.progress)
    if progress.total_steps and progress.step >= progress.total_steps:
        phase, text = "Evaluating", "all steps are done; base model and adapter are evaluated, the adapter is uploaded"
    elif attempt.loading:
        phase, text = "Training", f"attempt {run.attempt} fetches and loads the base model in Job {run.job_name}"
    else:
        phase, text = "Training", f"attempt {run.attempt} trains in Job {run.job_name}"
    changes = {"phase": phase, "run": run, "reason": phase, "message": text, "progress": progress}
    return base.model_copy(update=changes)


def _progress(before: ProgressStatus, reported: ProgressStatus | None) -> ProgressStatus:
    if reported is None:
        return before
    # A pod that has just started again may not know the number of steps yet.
    return reported.model_copy(update={"total_steps": reported.total_steps or before.total_steps})


def with_history(status: FineTuneStatus, result: str, reason: str, now: dt.datetime) -> FineTuneStatus:
    """The status with the run that ends now on top of its history."""
    run = status.run or RunStatus()
    adapter = status.adapter
    # Also of a run whose exports failed: its adapter may be served.
    own = adapter is not None and (result == "Succeeded" or (bool(run.id) and adapter.run_id == run.id))
    made = adapter.model_dump() if adapter is not None and own else {"run_id": run.id}
    entry = HistoryEntry(**{**made, "result": result, "reason": reason, "finished_at": times.rfc3339(now)})
    # A run that failed, or exported, and went on later is one run: only how it ended last counts.
    older = [
        e
        for e in status.history
        if not (run.id and e.run_id == run.id and (e.result != "Succeeded" or e.digest == entry.digest))
    ]
    return status.model_copy(update={"history": _newest([entry, *older])})


def _newest(entries: list[HistoryEntry]) -> list[HistoryEntry]:
    """The newest ones, and always the newest that may be served."""
    kept = entries[:HISTORY_KEPT]
    if any(e.gate_passed for e in kept):
        return kept
    served = next((e for e in entries[HISTORY_KEPT:] if e.gate_passed), None)
    return [*kept[:-1], served] if served is not None else kept


# ---- conditions ------------------------------------------------------------------------------------------------------


def _dataset_valid(_: View, status: FineTuneStatus) -> Verdict:
    if status.dataset is not None:
        data = status.dataset
        return "True", "Checked", f"{data.samples} samples, {data.tokens} tokens, format {data.format}"
    if status.phase == "Failed" and status.reason in ("InvalidDataset", "DatasetNotFound"):
        return "False", status.reason, status.message
    return "Unknown", "NotChecked", "the dataset has not been checked yet"


def _fits_gpu(view: View, status: FineTuneStatus) -> Verdict:
    if status.phase == "Failed" and status.reason in ("DoesNotFit", "CUDAOutOfMemory"):
        return "False", status.reason, status.message
    if view.parent.spec.resources.gpus == 0:
        return "Unknown", "NoGPU", "resources.gpus is 0: the run trains on the CPU"
    if status.estimate is None:
        return "Unknown", "NotEstimated", "the memory has not been estimated yet"
    if status.estimate.verdict == "Unknown":
        return "Unknown", "GPUMemoryUnknown", "set resources.gpuMemory to have it checked before a GPU is asked for"
    memory = status.estimate.gpu_memory
    text = f"about {memory.expected} of {view.parent.spec.resources.gpu_memory}" if memory else ""
    return ("True" if status.estimate.verdict == "Fits" else "False"), status.estimate.verdict, text


def _gate_passed(_: View, status: FineTuneStatus) -> Verdict:
    run, adapter = status.run or RunStatus(), status.adapter
    ended = run.finished_at or run.trained_at
    if adapter is None or ended is None or adapter.run_id != run.id:
        return "Unknown", "NotEvaluated", "the run has no adapter yet"
    gates = status.evaluation.gates if status.evaluation else []
    if adapter.gate_passed is False:
        return "False", "GateNotPassed", "; ".join(g.message or g.metric for g in gates if not g.passed)
    return "True", "Passed" if gates else "NoGates", "; ".join(g.message or g.metric for g in gates)


def _complete(_: View, status: FineTuneStatus) -> Verdict:
    return "True" if status.phase == "Succeeded" else "False", status.reason or status.phase, status.message


def _failed(_: View, status: FineTuneStatus) -> Verdict:
    if status.phase == "Failed":
        return "True", status.reason, status.message
    return "False", status.phase, ""


def _suspended(_: View, status: FineTuneStatus) -> Verdict:
    # True only once the pod is gone: then its GPU is free.
    if status.phase == "Suspended" and status.reason == "Suspended":
        return "True", "Suspended", status.message
    return "False", status.reason if status.phase == "Suspended" else "NotSuspended", ""


CONDITIONS: dict[str, Callable[[View, FineTuneStatus], Verdict]] = {
    "DatasetValid": _dataset_valid,  # the data can be trained on
    "FitsGPU": _fits_gpu,  # the run is expected to fit in resources.gpuMemory
    "GatePassed": _gate_passed,  # the adapter of this run may be served
    "Complete": _complete,  # the run ended with an adapter; otherwise why not, or not yet
    "Failed": _failed,  # the run ended without one
    "Suspended": _suspended,  # stopped by spec.suspend, its GPU is free
}


def conditions(view: View, status: FineTuneStatus) -> list[Condition]:
    """All conditions; the time of each moves only when its status does."""
    before = {c.type: c for c in status.conditions}
    found = []
    for kind, decide in CONDITIONS.items():
        holds, reason, message = decide(view, status)
        old = before.get(kind)
        since = old.last_transition_time if old is not None and old.status == holds else None
        found.append(
            Condition(
                type=kind,
                status=holds,
                reason=reason,
                message=message,
                last_transition_time=since or times.rfc3339(view.now),
                observed_generation=view.parent.metadata.generation,
            )
        )
    return found


# ---- what kubectl get shows ------------------------------------------------------------------------------------------


def summary(status: FineTuneStatus) -> FineTuneSummary:
    progress = status.progress or ProgressStatus()
    evaluated = status.evaluation.adapter.get("loss") if status.evaluation and status.phase in EVALUATED else None
    loss = evaluated if evaluated is not None else progress.eval_loss
    running = status.phase in ("Training", "Evaluating")
    return FineTuneSummary(
        progress=f"{progress.step}/{progress.total_steps}" if progress.total_steps else "-",
        loss=_decimals(progress.loss),
        eval=_decimals(loss),
        eta=short_duration(progress.eta_seconds) if running and progress.eta_seconds is not None else "-",
        adapter=status.adapter.digest.removeprefix("sha256:")[:12] if status.adapter else "-",
        cost=_price_tag(status.cost),
    )


def short_duration(seconds: int) -> str:
    """`45s`, `3m`, `2h10m`."""
    if seconds < 60:
        return f"{seconds}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _price_tag(cost: CostStatus | None) -> str:
    if cost is None or not cost.gpu_hours:
        return "-"
    hours = f"{cost.gpu_hours:.2f}h"
    return hours if cost.amount is None else f"{hours} {cost.amount:.2f}"


def _cost(view: View, status: FineTuneStatus) -> CostStatus:
    run = status.run or RunStatus()
    live: float = 0
    # In whole minutes while it runs, or every look at the object would be a write, and every write a look.
    if view.current is not None and run.finished_at is None and run.job_name == view.current.job:
        live = view.current.gpu_seconds(view.now.replace(second=0, microsecond=0))
    hours = round((run.gpu_seconds + live) / 3600, 4)
    rate = limits.price(view)
    return CostStatus(gpu_hours=hours, amount=None if rate is None else round(hours * rate, 4))


def to_json(status: FineTuneStatus) -> dict[str, Any]:
    """As written to the API server: without what is not known."""
    compacted: dict[str, Any] = _compact(status.model_dump(mode="json", by_alias=True, exclude_none=True))
    return compacted


def _compact(value: Any) -> Any:
    if isinstance(value, dict):
        compacted = {key: _compact(item) for key, item in value.items()}
        return {key: item for key, item in compacted.items() if item not in ("", [], {})}
    return [_compact(item) for item in value] if isinstance(value, list) else value
