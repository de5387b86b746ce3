"""Brings a run's metrics to its trackers: one thread each, beside the training, which never waits for them.

There is no queue: a run keeps its metrics anyway, and a thread remembers how far its tracker is. So a tracker that was
away gets what it missed, and an attempt that goes on from a checkpoint sends no step twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune_operator.api.finetunestatus import TrackerStatus
from finetune_trainer.page.story import Story
from finetune_trainer.runspec import RunSpec

log = logging.getLogger(__name__)

INTERVAL = 5.0  # seconds between two looks at the metrics
LONGEST_PAUSE = 60.0  # after failures
BATCH = 100  # steps at once
MESSAGE = 500  # characters of it that are kept

Lines = Sequence[Mapping[str, Any]]
End = Literal["Finished", "Failed", "Interrupted"]
# Seconds that the end of a run waits for its trackers at most. After SIGTERM the checkpoint is saved by then.
PATIENCE: dict[End, float] = {"Finished": 10.0, "Failed": 10.0, "Interrupted": 5.0}


class TrackerRefused(Exception):
    """It is of no use to try again; the message says what to do."""


class Tracker(Protocol):
    """The run in one experiment tracker. Calls may take their time, and may raise whatever a library raises."""

    name: Literal["MLflow", "WandB"]
    url: str  # the run's page, once it is open

    def open(self, story: Story) -> int:
        """Find this run or make it; returns the newest step that it has. Called again after a failure."""

    def log(self, lines: Lines) -> None:
        """Take steps, each after the newest one."""

    def close(self, story: Story, end: End) -> None:
        """Take what came of the run, in less time than PATIENCE."""


class Follower:
    """One tracker and its thread."""

    def __init__(self, tracker: Tracker, story: Story, interval: float = INTERVAL) -> None:
        self.tracker, self.story, self.interval = tracker, story, interval
        self.sent = 0  # newest step that the tracker has
        self.trouble = ""
        self._opened = False
        self._end: End | None = None
        self._deadline = 0.0
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name=f"tracking-{tracker.name}")

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def start(self) -> None:
        if not self.started:
            self._thread.start()

    def end(self, end: End) -> None:
        """Say that the run has ended; the rest is brought at once."""
        self._end, self._deadline = end, time.monotonic() + PATIENCE[end]
        self._wake.set()

    def now(self) -> TrackerStatus:
        """How it is while training goes on."""
        return TrackerStatus(name=self.tracker.name, url=self.tracker.url, message=self.trouble[:MESSAGE])

    def status(self) -> TrackerStatus:
        """What became of it, once its patience is over."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        trouble = self.trouble or ("it did not answer in time" if self._thread.is_alive() else "")
        missing = len(self.story.metrics) - self.sent
        if trouble and missing > 0:
            trouble = f"{missing} of {len(self.story.metrics)} steps are missing there: {trouble}"
        if trouble:
            log.warning("tracking: %s: %s", self.tracker.name, trouble)
        else:
            log.info("tracking: %s has every step", self.tracker.name)
        return TrackerStatus(name=self.tracker.name, url=self.tracker.url, message=trouble[:MESSAGE])

    def _follow(self) -> None:
        pause = self.interval
        while True:
            end = self._end  # before the lines are read: those of a run that has ended are complete
            try:
                self._bring(end)
            except TrackerRefused as refusal:
                self.trouble = str(refusal)
                log.warning("tracking: %s: %s; training goes on without it", self.tracker.name, refusal)
                return
            except Exception as error:  # noqa: BLE001  # whatever a library raises, training goes on
                pause, before = min(2 * pause, LONGEST_PAUSE), self.trouble
                self.trouble, self._opened = f"{type(error).__name__}: {error}", False
                if not before and not end:
                    log.warning(
                        "tracking: %s: %s; training goes on, and it is tried again", self.tracker.name, self.trouble
                    )
            else:
                pause, self.trouble = self.interval, ""
            if end:
                return
            self._wake.wait(pause)

    def _bring(self, end: End | None) -> None:
        if not self._opened:
            self.sent = self.tracker.open(self.story)
            self._opened = True
            log.info("tracking: %s: %s", self.tracker.name, self.tracker.url)
        # The newest step may still get the result of an evaluation.
        lines = self.story.metrics if end else self.story.metrics[:-1]
        for start in range(self.sent, len(lines), BATCH):
            batch = lines[start : start + BATCH]
            self.tracker.log(batch)
            self.sent = int(batch[-1]["step"])
        if end:
            self.tracker.close(self.story, end)


class Tracking:
    """All trackers of a run; does nothing where none is asked for."""

    def __init__(self, run: RunSpec, story: Story, work: Path) -> None:
        self.followers = [Follower(tracker, story) for tracker in trackers(run, work)]

    def step(self) -> None:
        """After an optimizer step: nothing is imported or asked before the first one."""
        for follower in self.followers:
            follower.start()

    def now(self) -> list[TrackerStatus]:
        """How they are while training goes on."""
        return [follower.now() for follower in self.followers]

    def end(self, end: End) -> list[TrackerStatus]:
        """Wait for the trackers, but not for long; says what each of them has."""
        if end == "Finished":
            self.step()  # there was none, when only the evaluation was left to do
        begun = [follower for follower in self.followers if follower.started]
        for follower in begun:
            follower.end(end)
        return [follower.status() for follower in begun]


def trackers(run: RunSpec, work: Path) -> list[Tracker]:
    """Those that the run asks for."""
    found: list[Tracker] = []
    if run.tracking and run.tracking.mlflow:
        from finetune_trainer.results.tracking.mlflow import MLflowRun

        found.append(MLflowRun(run.tracking.mlflow))
    if run.tracking and run.tracking.wandb:
        from finetune_trainer.results.tracking.wandb import WandBRun

        found.append(WandBRun(run.tracking.wandb, work / "wandb"))
    return found
