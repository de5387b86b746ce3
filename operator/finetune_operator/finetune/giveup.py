"""When an attempt counts as failed although its Job has not ended: waiting longer would help nobody."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

from finetune_operator.api.finetunestatus import RunStatus
from finetune_operator.finetune import observe
from finetune_operator.finetune.observe import Attempt

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
        pod = attempt.pods[-1]
        message = f"pod {pod['metadata']['name']} was to end, and node {pod['spec'].get('nodeName')} does not answer"
        return replace(attempt, state="Failed", given_up=True, reason="NodeLost", message=message)
    return attempt


def seconds_until_lost(attempt: Attempt, now: dt.datetime) -> float | None:
    """Until the attempt's newest pod counts as lost; None as long as nobody has told it to end."""
    if not attempt.pods or not observe.holds(attempt.pods[-1]):
        return None
    return observe.seconds_until_overdue(attempt.pods[-1], now)
