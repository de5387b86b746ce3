"""What a Job and its pods say about one attempt: pure reading, no decisions.

One Job is one attempt. Its pods may be several: the Job controller replaces pods that were disrupted, and those pods
count neither as failures nor as attempts.
"""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from finetune_operator import labels, times
from finetune_operator.api.finetunestatus import ProgressStatus
from finetune_operator.finetune import causes, readings
from finetune_operator.finetune.readings import Object
from finetune_operator.report import Report
from finetune_trainer.runspec import Result, Stage

OUT_OF_MEMORY = ("OutOfMemory", "CUDAOutOfMemory")
MAX_WAITS_FOR = 500  # characters
Told = TypeVar("Told", int, bool, str)

State = Literal["Waiting", "Running", "Succeeded", "Failed"]


@dataclass(frozen=True)
class Attempt:
    """One Job of a run, as observed."""

    job: str
    uid: str
    stage: Stage
    inputs: str
    state: State
    waits_since: dt.datetime  # when its newest pod (or, without one, itself) was created
    reason: str = ""  # why it waits or failed: a key of reasons.WAITING or reasons.FAILURES
    message: str = ""
    result: Result | None = None
    progress: ProgressStatus | None = None
    micro_batch: int | None = None  # as ordered in its run spec, or as its pod says
    loading: bool = False  # its pod says that the base model is not loaded yet
    waits_for: str = ""  # what its pod says that it waits for, while it runs
    nodes: int = 1  # pods that run at once
    gpus: int = 0  # of each pod
    disruptions: int = 0  # pods that the Job controller replaced
    finished_at: dt.datetime | None = None
    given_up: bool = False  # failed by our own judgement: its Job has not ended
    interruption: tuple[str, str] | None = None  # reason and message of the newest pod that was replaced
    pods: tuple[Object, ...] = field(default=(), repr=False)

    def gpu_seconds(self, now: dt.datetime) -> float:
        """GPU time up to `now`, over all its pods."""
        return self.gpus * sum(readings.seconds_running(pod, now) for pod in self.pods)


def attempt(job: Object, all_pods: Iterable[Object], reports: Mapping[str, Report]) -> Attempt:
    """Read one Job with its pods and their reports."""
    uid = job["metadata"]["uid"]
    pods = sorted((p for p in all_pods if readings.owner(p) == uid), key=readings.created)
    own_reports = [r for r in reports.values() if r.job_uid == uid]
    result = _result(job, pods, own_reports)
    state, reason, message = _state(job, pods, result)
    evicted = next((pod for pod in pods if causes.own_eviction(pod)), None)
    given_up = evicted is not None and state in ("Waiting", "Running")
    if evicted is not None and given_up:
        # The Job controller takes it for an interruption, and would replace the pod for ever.
        state, (reason, message) = "Failed", causes.why_pod_failed(evicted, {})
    interrupted = [pod for pod in pods if causes.interrupted(pod)]
    loading = _told(own_reports, "loading", bool) or False
    if loading and reason in OUT_OF_MEMORY:
        reason = "OutOfMemoryWhileLoading"
        message += " while the base model was loaded: a smaller micro batch would not help"
    return Attempt(
        job=job["metadata"]["name"],
        uid=uid,
        stage=job["metadata"]["labels"][labels.STAGE],
        inputs=job["metadata"]["labels"].get(labels.INPUTS, ""),
        state=state,
        waits_since=readings.created(pods[-1] if pods else job),
        reason=reason,
        message=message,
        result=result,
        progress=_progress(own_reports),
        micro_batch=_told(own_reports, "microBatch", int) or _run_spec(job).get("microBatch"),
        loading=loading,
        waits_for=(_told(own_reports, "waitsFor", str) or "")[:MAX_WAITS_FOR],
        nodes=readings.nodes(job),
        gpus=_gpus(job),
        # All pods of a run are interrupted together.
        disruptions=max(Counter(readings.index(p) for p in pods if causes.interrupted(p)).values(), default=0),
        finished_at=_finished(job),
        given_up=given_up,
        interruption=causes.why_pod_failed(interrupted[-1], {}) if interrupted else None,
        pods=tuple(pods),
    )


def ended(job: Object) -> bool:
    """Complete or failed: no pod of it runs or will run."""
    return _finished(job) is not None


def _state(job: Object, pods: Sequence[Object], result: Result | None) -> tuple[State, str, str]:
    # 1. The result is the truth, however it came: the Job's own conditions follow seconds later.
    if result is not None and result.failure is None:
        return "Succeeded", "", ""
    several = readings.nodes(job) > 1
    if result is not None and result.failure is not None and not several:
        return "Failed", result.failure.reason, result.failure.message
    # 2. The Job ended without one. Which of several pods failed first is known when all have ended.
    failed = _condition(job, "Failed") or (None if several else _condition(job, "FailureTarget"))
    if failed is not None:
        return "Failed", *causes.why_failed(job, pods, failed)
    if _condition(job, "Complete") is not None:
        return "Failed", "NoResult", "the Job is complete, but its pod left no result and no report arrived"
    # 3. It runs, or waits for something.
    newest = readings.newest(pods)
    waiting = [p for p in newest if readings.phase(p) != "Succeeded" and readings.container_state(p, "running") is None]
    if len(newest) == readings.nodes(job) and not waiting:
        return "Running", "", ""
    return "Waiting", *causes.why_waiting(job, newest, waiting)


def _result(job: Object, pods: Iterable[Object], reports: Iterable[Report]) -> Result | None:
    """What the first pod says: it alone speaks for the Job while its pods run."""
    texts: list[Any] = [r.body.get("result") for r in reports]
    for pod in pods:
        if readings.index(pod) == 0:
            texts.append((readings.container_state(pod, "terminated") or {}).get("message"))
    return next((result for text in texts if (result := readings.own_result(job, text)) is not None), None)


def _progress(reports: Iterable[Report]) -> ProgressStatus | None:
    newest = max((r for r in reports if r.body.get("progress")), key=lambda r: r.received, default=None)
    if newest is None:
        return None
    try:
        progress = ProgressStatus.model_validate(newest.body["progress"])
    except ValidationError:
        return None
    return (
        progress
        if progress.reported_at
        else progress.model_copy(update={"reported_at": times.rfc3339(newest.received)})
    )


def _told(reports: Iterable[Report], what: str, kind: type[Told]) -> Told | None:
    """What the pod that reported last says about one thing."""
    newest = max((r for r in reports if what in r.body), key=lambda r: r.received, default=None)
    said = newest.body[what] if newest is not None else None
    return said if isinstance(said, kind) else None


def _run_spec(job: Object) -> Object:
    annotations = job["spec"]["template"]["metadata"].get("annotations") or {}
    spec: Object = json.loads(annotations.get(labels.RUN_SPEC, "{}"))
    return spec


def _gpus(job: Object) -> int:
    limits = job["spec"]["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return sum(int(amount) for name, amount in limits.items() if "/" in name)


def _finished(job: Object) -> dt.datetime | None:
    for kind in ("Complete", "Failed"):
        condition = _condition(job, kind)
        if condition is not None and condition.get("lastTransitionTime"):
            return times.parse(condition["lastTransitionTime"])
    return None


def _condition(job: Object, kind: str) -> Object | None:
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)
