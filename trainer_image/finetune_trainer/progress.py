"""How far a run is: a line in the log, and a report to the operator, at most every few seconds."""

import logging
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_operator.api.finetunestatus import AdapterStatus, EvaluationStatus, ProgressStatus, TrackerStatus
from finetune_trainer.report import Listener
from finetune_trainer.runspec import TrainResult
from finetune_trainer.training.fit import Fit

log = logging.getLogger(__name__)

LOG_INTERVAL = 10.0


class Progress:
    """Called after every step; keeps the figures of the run."""

    def __init__(self, fit: Fit, listener: Listener, tracking: Callable[[], list[TrackerStatus]] = list) -> None:
        self.fit, self.listener, self.tracking = fit, listener, tracking
        self.resumed_from: int | None = fit.state.step or None
        self.seconds_to_first_step: float | None = None
        self.tokens_per_second = 0.0
        self._start = self._logged = self._mark = time.monotonic()
        self._start_tokens = self._mark_tokens = fit.state.tokens
        self._start_step = self._mark_step = fit.state.step
        self.seconds_to_loop = round(process_age(), 2)
        log.info("start: training begins %.1f s after the start of the process", self.seconds_to_loop)

    def step(self) -> None:
        """After an optimizer step."""
        state, moment = self.fit.state, time.monotonic()
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = round(process_age(), 2)
            log.info(
                "step %d: first step %.1f s after the start of the process", state.step, self.seconds_to_first_step
            )
        if self.listener.due() and self.listener.progress(self.status()):
            self._mark, self._mark_step, self._mark_tokens = moment, state.step, state.tokens
        if moment - self._logged >= LOG_INTERVAL or state.step == self.fit.plan.steps:
            self._logged = moment
            status = self.status()
            log.info(
                "step %d/%d  epoch %.2f  loss %.4f  rate %.2e  %.0f tokens/s  %s left",
                state.step, self.fit.plan.steps, status.epoch, state.last_loss or 0.0, status.learning_rate or 0.0,
                status.tokens_per_second or 0.0, _short(status.eta_seconds or 0),
            )  # fmt: skip

    def status(self) -> ProgressStatus:
        """status.progress: the loss is the mean since the last report, the speed that of this attempt."""
        state, plan = self.fit.state, self.fit.plan
        elapsed = max(time.monotonic() - self._start, 1e-6)
        done = state.step - self._start_step
        self.tokens_per_second = (state.tokens - self._start_tokens) / elapsed
        newest = (
            [line["loss"] for line in state.metrics[self._mark_step - state.step :]]
            if state.step > self._mark_step
            else []
        )
        loss = sum(newest) / len(newest) if newest else state.last_loss
        return ProgressStatus(
            step=state.step,
            total_steps=plan.steps,
            epoch=round(plan.epoch(state.step), 4),
            loss=round(loss, 6) if loss is not None else None,
            eval_loss=state.eval_loss,
            learning_rate=state.metrics[-1]["learningRate"] if state.metrics else None,
            tokens_per_second=round(self.tokens_per_second, 1),
            eta_seconds=round((plan.steps - state.step) * elapsed / done) if done else None,
            tracking=self.tracking(),
        )

    def figures(self) -> dict[str, Any]:
        """Of this attempt, for run.json."""
        return {
            "secondsToLoop": self.seconds_to_loop,
            "secondsToFirstStep": self.seconds_to_first_step,
            "tokensPerSecond": round(self.tokens_per_second, 1),
            "trainSeconds": round(time.monotonic() - self._start, 1),
            "steps": self.fit.state.step - self._start_step,
            "processSeconds": round(process_age(), 1),
            "microBatch": self.fit.plan.micro_batch,
            "shards": self.fit.plan.shards,
        }

    def result(
        self, adapter: AdapterStatus, evaluation: EvaluationStatus, report: str, tracking: list[TrackerStatus]
    ) -> TrainResult:
        """What the operator is told in the end."""
        return TrainResult(
            adapter=adapter,
            evaluation=evaluation,
            steps=self.fit.state.step,
            final_loss=self.fit.state.last_loss,
            resumed_from_step=self.resumed_from,
            seconds_to_first_step=self.seconds_to_first_step,
            micro_batch=self.fit.plan.micro_batch,
            report=report,
            tracking=tracking,
        )


def process_age() -> float:
    """Seconds since this process was started, interpreter and imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_memory() -> dict[str, int]:
    """Bytes that the process had at most: of the host, and of the GPU where there is one."""
    import torch

    peak = {"hostBytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak["gpuBytes"] = torch.cuda.max_memory_allocated()
    return peak


def _short(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds}s"
    return f"{seconds // 60}m" if seconds < 7200 else f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
