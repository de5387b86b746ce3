"""When an attempt counts as failed although its Job has not ended: waiting longer would help nobody."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

from finetune_operator.api.finetunestatus import RunStatus
from finetune_operator.finetune import readings
from finetune_operator.finetune.observe import Attempt

Object = dict[str, Any]

# An image that cannot be pulled keeps a node's GPU for nothing.
PULL_SECONDS = 15 * 60


def judged(attempt: Attempt, run: RunStatus, newest_image: str, now: dt.datetime) -> Attempt:
    """The attempt, or the same one failed by our own judgement."""
    if attempt.state in ("Succeeded", "Failed"):
        return attempt
    if attempt.reason == "ImagePullFailed":
        # The chart names another image by now, and nothing was made with the old one yet.
        replaced = not run.id and run.trainer_image != newest_image
        if replaced or (now - attempt.waits_since).total_seconds() > PULL_SECONDS:
            return replace(attempt, state="Failed", given_up=True)
    left = seconds_until_lost(attempt, now)
    if left is not None and left <= 0:
        # Its kubelet is silent: the Job controller would wait for its word for ever.
        pod = min(_ending(attempt, now), key=lambda ending: ending[0])[1]
        message = f"pod {pod['metadata']['name']} was to end, and node {pod['spec'].get('nodeName')} does not answer"
        return replace(attempt, state="Failed", given_up=True, reason="NodeLost", message=message)
    return attempt


def seconds_until_lost(attempt: Attempt, now: dt.datetime) -> float | None:
    """Until a pod of the attempt counts as lost; None as long as nobody has told one to end."""
    return min((left for left, _ in _ending(attempt, now)), default=None)


def _ending(attempt: Attempt, now: dt.datetime) -> list[tuple[float, Object]]:
    """The pods that were told to end and have not, each with the seconds until it counts as lost."""
    pods = [(readings.seconds_until_overdue(pod, now), pod) for pod in attempt.pods if readings.holds(pod)]
    return [(left, pod) for left, pod in pods if left is not None]
