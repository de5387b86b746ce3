"""What happens when a FineTune with `deletionPolicy: Delete` is deleted: one step at a time, and never for ever. Pure.

Others block here: KubeRay's finalizer waited for a clean-up Job that a terminating namespace refuses, that a policy
refuses, or that fails (kuberay#3388, #4721, #4767). So every way ends with the finalizer gone, and says what is left.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_operator import labels, times
from finetune_operator.api.finetune import FineTune
from finetune_operator.event import Event
from finetune_operator.finetune import cleanupjob, readings
from finetune_operator.finetune.ownership import Artifacts
from finetune_operator.settings import Settings
from finetune_trainer.cleanupspec import CleanupResult

Object = dict[str, Any]

#: From the deletion on. Then the object goes, and what is left of its artifacts stays.
GIVE_UP_SECONDS = 3600.0
#: After the first failure; twice as long after each further one.
PAUSE_SECONDS = 30.0
POD_SECONDS = 5.0
WAY_OUT = "to delete the object at once and keep them, set spec.deletionPolicy: Retain"


@dataclass(frozen=True)
class Step:
    """Delete these Jobs, create that one, show this reason, post this event; `release` takes the finalizer off."""

    release: bool = False
    delete: tuple[Object, ...] = ()
    create: Object | None = None
    reason: str = ""
    message: str = ""
    event: Event | None = None
    again: float | None = None


def step(
    parent: FineTune,
    artifacts: Artifacts,
    jobs: Sequence[Object],
    pods: Sequence[Object],
    settings: Settings,
    now: dt.datetime,
) -> Step:
    """`jobs` and `pods`: all that carry the FineTune's name."""
    work = tuple(job for job in jobs if _owned(job, parent.metadata.uid))
    tries = sorted((job for job in jobs if _cleans_up(job, parent.metadata.uid)), key=_attempt)
    if parent.spec.deletion_policy != "Delete":
        return Step(release=True, delete=tuple(tries))
    left = GIVE_UP_SECONDS - (now - times.parse(parent.metadata.deletion_timestamp or "")).total_seconds()
    if left <= 0:
        return Step(release=True, delete=(*work, *tries), event=kept(artifacts, "nothing worked for an hour"))
    holding = [pod for pod in readings.still_running(pods, now) if readings.owner(pod) not in map(_uid, tries)]
    if work or holding:
        # A pod that still saves its checkpoint would write it again after it was deleted.
        return Step(delete=work, reason="Deleting", message="waits until the run's pods have ended", again=POD_SECONDS)
    if not artifacts.delete:
        return Step(release=True, event=_done(artifacts, 0))
    return _next_try(parent, artifacts, tries, pods, settings, now, left)


def kept(artifacts: Artifacts, why: str) -> Event:
    """The object goes, its artifacts stay."""
    return Event("ArtifactsKept", f"{why}; in the bucket stay {_listed(artifacts.delete)}", "Warning")


def _next_try(
    parent: FineTune,
    artifacts: Artifacts,
    tries: Sequence[Object],
    pods: Sequence[Object],
    settings: Settings,
    now: dt.datetime,
    left: float,
) -> Step:
    begin = Step(
        create=cleanupjob.job(parent, artifacts.delete, len(tries) + 1, settings),
        reason="Deleting",
        message=f"deletes {_listed(artifacts.delete)}; {WAY_OUT}",
        again=left,
    )
    if not tries:
        return begin
    newest = tries[-1]
    result = _result(newest, pods)
    if _condition(newest, "Complete") is not None:
        return Step(release=True, event=_done(artifacts, result.objects if result else None))
    failed = _condition(newest, "Failed")
    if failed is None:
        return Step(reason="Deleting", message=begin.message, again=left)
    why = result.failure.message if result is not None and result.failure is not None else failed.get("message", "")
    pause = PAUSE_SECONDS * 2 ** (len(tries) - 1) - (now - times.parse(failed["lastTransitionTime"])).total_seconds()
    text = f"Job {newest['metadata']['name']}: {why.rstrip('.')}. It is tried again for an hour; {WAY_OUT}"
    event = Event("CleanupFailed", text, "Warning") if parent.status.message != text else None
    if pause > 0:
        return Step(reason="CleanupFailed", message=text, event=event, again=min(pause, left))
    return begin


def _done(artifacts: Artifacts, objects: int | None) -> Event:
    text = f"deleted {_listed(artifacts.delete)}" if artifacts.delete else "nothing in the bucket is its own"
    if objects is not None and artifacts.delete:
        text += f" ({objects} objects)"
    return Event("ArtifactsDeleted", f"{text}; kept {_listed(artifacts.kept)}" if artifacts.kept else text)


def _listed(uris: Sequence[str]) -> str:
    return ", ".join(uris) or "nothing"


def _owned(job: Object, uid: str) -> bool:
    return any(owner.get("uid") == uid for owner in job["metadata"].get("ownerReferences") or [])


def _cleans_up(job: Object, uid: str) -> bool:
    return bool(job["metadata"].get("labels", {}).get(labels.OWNER_UID) == uid)


def _attempt(job: Object) -> int:
    return int(job["metadata"]["labels"][labels.ATTEMPT])


def _uid(item: Object) -> str:
    return str(item["metadata"]["uid"])


def _condition(job: Object, kind: str) -> Object | None:
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def _result(job: Object, pods: Sequence[Object]) -> CleanupResult | None:
    """What the Job's pod left as its last words."""
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses") or []:
            ended = status.get("state", {}).get("terminated") or {}
            if readings.owner(pod) == _uid(job) and ended.get("message"):
                try:
                    return CleanupResult.model_validate_json(ended["message"])
                except ValidationError:
                    return None  # the last lines of the log
    return None
