"""What is read of a Job and of one of its pods: a field, a time, a state."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from finetune_operator import labels, times
from finetune_trainer.runspec import Result

Object = dict[str, Any]

CONTAINER = "trainer"


def nodes(job: Object) -> int:
    return int(job["spec"].get("completions") or 1)


def own_result(job: Object, text: Any) -> Result | None:
    """A Job's own Result, out of what one of its pods has left or sent."""
    if not text:
        return None
    try:
        result = Result.model_validate_json(text) if isinstance(text, str) else Result.model_validate(text)
    except ValidationError:
        return None  # the last lines of a log (FallbackToLogsOnError), or another version's words
    return result if result.job == job["metadata"]["name"] else None


def owner(pod: Object) -> str:
    """uid of the controller of a pod."""
    references = pod["metadata"].get("ownerReferences") or []
    return next((str(r["uid"]) for r in references if r.get("controller")), "")


def container_creating(pod: Object) -> bool:
    """Scheduled, but its container is not there yet and the pod does not say why."""
    waiting = container_state(pod, "waiting") or {}
    scheduled = bool(pod["spec"].get("nodeName")) and phase(pod) == "Pending"
    return scheduled and waiting.get("reason", "ContainerCreating") in ("ContainerCreating", "PodInitializing")


def still_running(pods: Iterable[Object], now: dt.datetime) -> list[Object]:
    """Pods that may still hold a GPU or write a checkpoint; one whose time to end is long over counts as gone."""
    return [p for p in pods if holds(p) and (seconds_until_overdue(p, now) or 1) > 0]


def holds(pod: Object) -> bool:
    """Nobody has said yet that the pod has ended."""
    return phase(pod) in ("Pending", "Running", "Unknown")


# A pod on a lost node is never confirmed as ended. Its successor waits this long beyond the grace period.
OVERDUE_SECONDS = 60.0


def seconds_until_overdue(pod: Object, now: dt.datetime) -> float | None:
    """Until a pod that was told to end must have ended, grace period included; None for other pods."""
    ends = pod["metadata"].get("deletionTimestamp")
    return OVERDUE_SECONDS - (now - times.parse(ends)).total_seconds() if ends else None


def newest(pods: Sequence[Object]) -> list[Object]:
    """The newest pod of each index, in the order of the indexes; of all, where there are no indexes."""
    newest = {index(pod): pod for pod in pods}
    return [newest[index] for index in sorted(newest)]


def index(pod: Object) -> int:
    """Which of its Job's pods this is."""
    return int(pod["metadata"].get("labels", {}).get(labels.COMPLETION_INDEX, "0"))


def seconds_running(pod: Object, now: dt.datetime) -> float:
    """From the moment the kubelet took the pod, which is when its GPUs are taken, to the end of its container."""
    started = pod.get("status", {}).get("startTime")
    if not started:
        return 0.0
    ended = (container_state(pod, "terminated") or {}).get("finishedAt")
    return max(((times.parse(ended) if ended else now) - times.parse(started)).total_seconds(), 0.0)


def container_state(pod: Object, state: str) -> Object | None:
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status["name"] == CONTAINER:
            found: Object | None = status.get("state", {}).get(state)
            return found
    return None


def created(item: Object) -> dt.datetime:
    return times.parse(item["metadata"]["creationTimestamp"])


def phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def image(pod: Object) -> str:
    return str(pod["spec"]["containers"][0].get("image", ""))
