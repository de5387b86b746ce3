"""What a Job and its pods say about one attempt: pure reading, no decisions.

One Job is one attempt. Its pods may be several: the Job controller replaces pods that were disrupted, and those pods
count neither as failures nor as attempts.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from finetune_operator import labels, times
from finetune_operator.api.finetunestatus import ProgressStatus
from finetune_operator.report import Report
from finetune_trainer.failures import PEER_LOST
from finetune_trainer.runspec import Result, Stage

Object = dict[str, Any]

CONTAINER = "trainer"
INTERRUPTED_EXIT = 143
KILLED_EXIT = 137

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
        return self.gpus * sum(_seconds_running(pod, now) for pod in self.pods)


def attempt(job: Object, all_pods: Iterable[Object], reports: Mapping[str, Report]) -> Attempt:
    """Read one Job with its pods and their reports."""
    uid = job["metadata"]["uid"]
    pods = sorted((p for p in all_pods if owner(p) == uid), key=_created)
    own_reports = [r for r in reports.values() if r.job_uid == uid]
    result = _result(job, pods, own_reports)
    state, reason, message = _state(job, pods, result)
    evicted = next((pod for pod in pods if own_eviction(pod)), None)
    given_up = evicted is not None and state in ("Waiting", "Running")
    if evicted is not None and given_up:
        # The Job controller takes it for an interruption, and would replace the pod for ever.
        state, (reason, message) = "Failed", _why_pod_failed(evicted, {})
    interrupted = [pod for pod in pods if _interrupted(pod)]
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
        waits_since=_created(pods[-1] if pods else job),
        reason=reason,
        message=message,
        result=result,
        progress=_progress(own_reports),
        micro_batch=_told(own_reports, "microBatch", int) or _run_spec(job).get("microBatch"),
        loading=loading,
        waits_for=(_told(own_reports, "waitsFor", str) or "")[:MAX_WAITS_FOR],
        nodes=_nodes(job),
        gpus=_gpus(job),
        # All pods of a run are interrupted together.
        disruptions=max(Counter(_index(p) for p in pods if _interrupted(p)).values(), default=0),
        finished_at=_finished(job),
        given_up=given_up,
        interruption=_why_pod_failed(interrupted[-1], {}) if interrupted else None,
        pods=tuple(pods),
    )


def owner(pod: Object) -> str:
    """uid of the controller of a pod."""
    references = pod["metadata"].get("ownerReferences") or []
    return next((str(r["uid"]) for r in references if r.get("controller")), "")


def container_creating(pod: Object) -> bool:
    """Scheduled, but its container is not there yet and the pod does not say why."""
    waiting = _container_state(pod, "waiting") or {}
    scheduled = bool(pod["spec"].get("nodeName")) and _phase(pod) == "Pending"
    return scheduled and waiting.get("reason", "ContainerCreating") in ("ContainerCreating", "PodInitializing")


def own_eviction(pod: Object) -> str | None:
    """The reason for which a pod was evicted through its own doing: it would happen to its successor too."""
    status = pod.get("status", {})
    if status.get("reason") != "Evicted":
        return None
    message = status.get("message", "")
    return next((reason for words, reason in _OWN_EVICTIONS.items() if re.search(words, message)), None)


# The kubelet's words (pkg/kubelet/eviction): for a volume with a size limit, for the ephemeral-storage limits of a
# container and of a pod, and for who used more than its request on a node that runs out of something. Nobody requests
# disk, so there the pod is at fault from about a gigabyte on.
_OWN_EVICTIONS = {
    "exceeds the limit|exceeded its local ephemeral storage limit|exceeds the total limit": "DiskLimitExceeded",
    rf"Container {CONTAINER} was using \S+, request is \S+, has larger consumption of memory": "OutOfMemory",
    rf"Container {CONTAINER} was using (\d{{7,}}Ki|\d+[GT]i), request is \S+, has larger consumption of ephemeral": "DiskFull",
}


def ended(job: Object) -> bool:
    """Complete or failed: no pod of it runs or will run."""
    return _finished(job) is not None


def still_running(pods: Iterable[Object], now: dt.datetime) -> list[Object]:
    """Pods that may still hold a GPU or write a checkpoint; one whose time to end is long over counts as gone."""
    return [p for p in pods if holds(p) and (seconds_until_overdue(p, now) or 1) > 0]


def holds(pod: Object) -> bool:
    """Nobody has said yet that the pod has ended."""
    return _phase(pod) in ("Pending", "Running", "Unknown")


# A pod on a lost node is never confirmed as ended. Its successor waits this long beyond the grace period.
OVERDUE_SECONDS = 60.0


def seconds_until_overdue(pod: Object, now: dt.datetime) -> float | None:
    """Until a pod that was told to end must have ended, grace period included; None for other pods."""
    ends = pod["metadata"].get("deletionTimestamp")
    return OVERDUE_SECONDS - (now - times.parse(ends)).total_seconds() if ends else None


def _state(job: Object, pods: Sequence[Object], result: Result | None) -> tuple[State, str, str]:
    # 1. The result is the truth, however it came: the Job's own conditions follow seconds later.
    if result is not None and result.failure is None:
        return "Succeeded", "", ""
    several = _nodes(job) > 1
    if result is not None and result.failure is not None and not several:
        return "Failed", result.failure.reason, result.failure.message
    # 2. The Job ended without one. Which of several pods failed first is known when all have ended.
    failed = _condition(job, "Failed") or (None if several else _condition(job, "FailureTarget"))
    if failed is not None:
        return "Failed", *_why_failed(job, pods, failed)
    if _condition(job, "Complete") is not None:
        return "Failed", "NoResult", "the Job is complete, but its pod left no result and no report arrived"
    # 3. It runs, or waits for something.
    newest = _newest(pods)
    waiting = [p for p in newest if _phase(p) != "Succeeded" and _container_state(p, "running") is None]
    if len(newest) == _nodes(job) and not waiting:
        return "Running", "", ""
    return "Waiting", *_why_waiting(job, newest, waiting)


def _newest(pods: Sequence[Object]) -> list[Object]:
    """The newest pod of each index, in the order of the indexes; of all, where there are no indexes."""
    newest = {_index(pod): pod for pod in pods}
    return [newest[index] for index in sorted(newest)]


def _index(pod: Object) -> int:
    """Which of its Job's pods this is."""
    return int(pod["metadata"].get("labels", {}).get(labels.COMPLETION_INDEX, "0"))


def _why_failed(job: Object, pods: Sequence[Object], condition: Object) -> tuple[str, str]:
    """Reason and message of a Job that failed, from the pod that failed first."""
    if not pods:
        return "PodDeleted", "the pod was deleted"
    broken = [pod for pod in _newest(pods) if _phase(pod) != "Succeeded"] or list(pods)
    causes = sorted((_blame(job, pod, condition) for pod in broken), key=lambda blame: blame.order)
    return causes[0].reason, causes[0].message


class _Blame(NamedTuple):
    """Why one of a Job's pods failed. First in `order` is what the others followed from: a pod that only missed
    another one, or was told to stop because of it, comes last."""

    order: tuple[bool, str, bool]
    reason: str
    message: str


def _blame(job: Object, pod: Object, condition: Object) -> _Blame:
    ended = _container_state(pod, "terminated") or {}
    told = _of_job(job, _parse(ended.get("message")))
    if told is not None and told.failure is not None:
        reason, message = told.failure.reason, told.failure.message
        if _nodes(job) > 1:
            message = f"pod {pod['metadata']['name']}: {message}"
    else:
        reason, message = _why_pod_failed(pod, condition)
    # One second is all that the time resolves.
    return _Blame((reason == PEER_LOST, ended.get("finishedAt") or "~", reason == "Interrupted"), reason, message)


def _why_pod_failed(pod: Object, condition: Object) -> tuple[str, str]:
    """Reason and message of a pod that failed without a result."""
    name = pod["metadata"]["name"]
    node = pod["spec"].get("nodeName", "its node")
    ended = _container_state(pod, "terminated") or {}
    disruption = _disruption(pod)
    # OOMKilled first: a pod that is killed for memory and evicted for it at once is a matter of memory.
    if ended.get("reason") == "OOMKilled":
        return "OutOfMemory", f"pod {name} used more memory than its limit and was killed (OOMKilled)"
    if pod.get("status", {}).get("reason") == "Evicted":
        message = f"pod {name} was evicted from {node}: {pod['status'].get('message', '').strip()}"
        return own_eviction(pod) or "Evicted", message
    if disruption is not None:
        return disruption, f"pod {name} was taken off {node}"
    if ended.get("exitCode") == INTERRUPTED_EXIT:
        return "Interrupted", f"pod {name} was told to stop and saved a checkpoint"
    if pod["metadata"].get("deletionTimestamp"):
        return "PodDeleted", f"pod {name} was deleted"
    if ended.get("exitCode") == KILLED_EXIT:
        return "Killed", f"the process in pod {name} was killed (exit code 137)"
    if ended:
        last_words = ended.get("message", "").strip().splitlines()[-1:] or [ended.get("reason", "")]
        return "InternalError", f"pod {name} ended with exit code {ended.get('exitCode')}: {last_words[0][:300]}"
    status = pod.get("status", {})
    text = status.get("message") or condition.get("message", "")
    return "InternalError", f"pod {name} failed: {status.get('reason') or condition.get('reason', '')} {text}".strip()


# The reasons of a pod's DisruptionTarget condition.
_DISRUPTIONS = {
    "PreemptionByScheduler": "Preempted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
}


def _disruption(pod: Object) -> str | None:
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return _DISRUPTIONS.get(condition.get("reason", ""), "Evicted")
    return None


def _interrupted(pod: Object) -> bool:
    if _phase(pod) != "Failed":
        return False
    ended = _container_state(pod, "terminated") or {}
    return _disruption(pod) is not None or ended.get("exitCode") == INTERRUPTED_EXIT


# What a container can be stuck in, as the kubelet names it.
_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError")


def _why_waiting(job: Object, pods: Sequence[Object], waiting_pods: Sequence[Object]) -> tuple[str, str]:
    """Of the first pod that waits; the others may run already."""
    if job["spec"].get("suspend"):
        queue = job["metadata"]["labels"].get(labels.KUEUE_QUEUE, "")
        return "WaitingForQuota", f"the Job waits in Kueue queue {queue}" if queue else "the Job is suspended"
    if not waiting_pods:
        several = f"{len(pods)} of {_nodes(job)} pods are there" if _nodes(job) > 1 else "the pod is being created"
        return "Starting", several
    pod = waiting_pods[0]
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return "Unschedulable", condition.get("message", "") or "no node can take the pod"
    waiting = _container_state(pod, "waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _PULL:
        return "ImagePullFailed", message or f"{reason}: {_image(pod)}"
    if reason in _CONFIG:
        return "MissingReference", message or reason
    return ("ContainerCreating" if reason == "ContainerCreating" else "Starting"), "the pod is starting"


def _result(job: Object, pods: Iterable[Object], reports: Iterable[Report]) -> Result | None:
    """What the first pod says: it alone speaks for the Job while its pods run."""
    texts: list[Any] = [r.body.get("result") for r in reports]
    for pod in pods:
        if _index(pod) == 0:
            texts.append((_container_state(pod, "terminated") or {}).get("message"))
    return next((result for text in texts if (result := _of_job(job, _parse(text))) is not None), None)


def _of_job(job: Object, result: Result | None) -> Result | None:
    return result if result is not None and result.job == job["metadata"]["name"] else None


def _parse(text: Any) -> Result | None:
    if not text:
        return None
    try:
        return Result.model_validate_json(text) if isinstance(text, str) else Result.model_validate(text)
    except ValidationError:
        return None  # the last lines of a log (FallbackToLogsOnError), or another version's words


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


def _nodes(job: Object) -> int:
    return int(job["spec"].get("completions") or 1)


def _seconds_running(pod: Object, now: dt.datetime) -> float:
    """From the moment the kubelet took the pod, which is when its GPUs are taken, to the end of its container."""
    started = pod.get("status", {}).get("startTime")
    if not started:
        return 0.0
    ended = (_container_state(pod, "terminated") or {}).get("finishedAt")
    return max(((times.parse(ended) if ended else now) - times.parse(started)).total_seconds(), 0.0)


def _finished(job: Object) -> dt.datetime | None:
    for kind in ("Complete", "Failed"):
        condition = _condition(job, kind)
        if condition is not None and condition.get("lastTransitionTime"):
            return times.parse(condition["lastTransitionTime"])
    return None


def _condition(job: Object, kind: str) -> Object | None:
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def _container_state(pod: Object, state: str) -> Object | None:
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status["name"] == CONTAINER:
            found: Object | None = status.get("state", {}).get(state)
            return found
    return None


def _created(item: Object) -> dt.datetime:
    return times.parse(item["metadata"]["creationTimestamp"])


def _phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _image(pod: Object) -> str:
    return str(pod["spec"]["containers"][0].get("image", ""))
