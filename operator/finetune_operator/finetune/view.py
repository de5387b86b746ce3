"""Everything that decisions about a FineTune rest on, gathered once: the object, its Jobs, and the moment."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_operator import labels, times
from finetune_operator.api.finetune import FineTune
from finetune_operator.api.finetunestatus import FineTuneStatus, RunStatus
from finetune_operator.finetune import giveup, observe, readings
from finetune_operator.finetune.observe import Attempt
from finetune_operator.report import Report
from finetune_operator.settings import Settings
from finetune_trainer.runspec import Stage, inputs_hash

Object = dict[str, Any]


def stage_of(run: RunStatus) -> Stage:
    """The stage that a run is in: its id is known exactly when it has been prepared."""
    if run.trained_at:
        return "export"
    return "train" if run.id else "prepare"


@dataclass(frozen=True)
class View:
    """`inputs` is what the spec asks for; `current` the newest attempt of the run, None when its Job does not exist."""

    parent: FineTune
    inputs: str
    jobs: tuple[Object, ...]
    current: Attempt | None
    holding: tuple[str, ...]  # pods of earlier attempts that have not ended
    settings: Settings
    now: dt.datetime
    twin: str = ""  # another FineTune that trains this very run

    @property
    def status(self) -> FineTuneStatus:
        return self.parent.status

    @property
    def run(self) -> RunStatus:
        return self.parent.status.run or RunStatus()

    @property
    def stage(self) -> Stage:
        return stage_of(self.run)

    @property
    def started(self) -> dt.datetime:
        return times.parse(self.run.started_at) if self.run.started_at else self.now


def view(
    parent: FineTune,
    jobs: Sequence[Object],
    pods: Sequence[Object],
    reports: Mapping[str, Report],
    explanations: Mapping[str, tuple[str, str]],
    settings: Settings,
    now: dt.datetime,
) -> View:
    """`explanations` says, by uid of a pod or Job, what Events tell about why it does not start."""
    run = parent.status.run
    own = tuple(job for job in jobs if _owned_by(job, parent.metadata.uid))
    job = next((j for j in own if run is not None and j["metadata"]["name"] == run.job_name), None)
    current = None
    if run is not None and job is not None:
        current = _explained(observe.attempt(job, pods, reports), job, explanations)
        current = giveup.judged(current, run, settings.images.trainer, now)
    current_pods = {pod["metadata"]["uid"] for pod in current.pods} if current else set()
    return View(
        parent=parent,
        # Without the trainer image: a newer one in the chart is no reason to train anything again.
        inputs=inputs_hash(parent.spec, trainer_image=""),
        jobs=own,
        current=current,
        holding=tuple(
            pod["metadata"]["name"]
            for pod in readings.still_running(pods, now)
            if pod["metadata"]["uid"] not in current_pods
            and pod["metadata"].get("labels", {}).get(labels.STAGE) == "train"
        ),
        settings=settings,
        now=now,
    )


def _explained(attempt: Attempt, job: Object, explanations: Mapping[str, tuple[str, str]]) -> Attempt:
    uids = [item["metadata"]["uid"] for item in (*reversed(attempt.pods), job)]
    told = next((explanations[uid] for uid in uids if uid in explanations), None)
    if attempt.state != "Waiting" or told is None:
        return attempt
    reason, message = told
    return replace(attempt, reason=reason, message=message)


def _owned_by(job: Object, uid: str) -> bool:
    # A Job of an earlier object of the same name is on its way out, and none of our business.
    return any(r.get("uid") == uid for r in job["metadata"].get("ownerReferences") or [])
