"""Why a pod does not start, where only Events say so: a volume that cannot be mounted, a pod that may not be created."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from typing import Any

from finetune_operator import times
from finetune_operator.finetune import observe, readings
from finetune_operator.kube import CORE_EVENTS, Kube

Object = dict[str, Any]

# A pod that starts as it should is past this before Events are read for it.
PATIENCE_SECONDS = 10.0
REASONS = {
    "FailedMount": "MountFailed",
    "FailedAttachVolume": "MountFailed",
    "FailedCreate": "PodNotCreated",
    "FailedCreatePodSandBox": "ContainerCreating",
}


async def waiting(
    kube: Kube, jobs: Sequence[Object], pods: Sequence[Object], now: dt.datetime
) -> dict[str, tuple[str, str]]:
    """By uid of a pod or Job that has waited silently for a while: reason and message of its newest such Event."""
    found = {}
    for item in _silent(jobs, pods):
        if _age(item, now) < PATIENCE_SECONDS:
            continue
        meta = item["metadata"]
        events = await kube.list(CORE_EVENTS, meta["namespace"], fields={"involvedObject.uid": meta["uid"]})
        telling = [e for e in events if e.get("reason") in REASONS]
        if telling:
            newest = max(telling, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")
            found[meta["uid"]] = (REASONS[newest["reason"]], newest.get("message", ""))
    return found


def again(jobs: Sequence[Object], pods: Sequence[Object], now: dt.datetime) -> float | None:
    """In how many seconds to look whether something silent can be explained, if anything is."""
    ages = [_age(item, now) for item in _silent(jobs, pods)]
    if not ages:
        return None
    return PATIENCE_SECONDS - min(ages) if min(ages) < PATIENCE_SECONDS else 3 * PATIENCE_SECONDS


def _silent(jobs: Sequence[Object], pods: Sequence[Object]) -> list[Object]:
    """Pods whose container is being created, and Jobs that lack a pod: neither says why."""
    created = Counter(readings.owner(pod) for pod in pods)
    idle = [
        job
        for job in jobs
        if created[job["metadata"]["uid"]] < (job["spec"].get("completions") or 1)
        and not observe.ended(job)
        and not job["spec"].get("suspend")
    ]
    return idle + [pod for pod in pods if readings.container_creating(pod)]


def _age(item: Object, now: dt.datetime) -> float:
    return (now - times.parse(item["metadata"]["creationTimestamp"])).total_seconds()
