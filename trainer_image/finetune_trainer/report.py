"""What a pod tells the operator: progress at most every 5 seconds, and the final Result. A failing report never fails a run."""

import json
import logging
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from finetune_operator.api.finetunestatus import ProgressStatus
from finetune_trainer.runspec import Result, RunSpec

log = logging.getLogger(__name__)

TOKEN = Path("/var/run/finetune/token")  # projected, for the audience finetune-operator; the kubelet renews it
CA = Path("/var/run/finetune/ca.crt")
INTERVAL = 5.0
TIMEOUT = 5.0
MAX_WAITS_FOR = 500
RESULT_ATTEMPTS = 4  # the termination message carries the Result too, so this need not try for ever


def trainer_status(progress: ProgressStatus) -> dict[str, Any]:
    """Progress in Kubeflow Trainer's words (`trainerStatus`): percentage, remaining seconds, metrics as strings."""
    metrics = {
        "step": progress.step,
        "epoch": progress.epoch,
        "loss": progress.loss,
        "eval_loss": progress.eval_loss,
        "learning_rate": progress.learning_rate,
        "tokens_per_second": progress.tokens_per_second,
    }
    status: dict[str, Any] = {
        "metrics": [{"name": name, "value": f"{value:.6g}"} for name, value in metrics.items() if value is not None],
        "lastUpdatedTime": progress.reported_at,
    }
    if progress.total_steps:
        status["progressPercentage"] = min(100, 100 * progress.step // progress.total_steps)
    if progress.eta_seconds is not None:
        status["estimatedRemainingSeconds"] = progress.eta_seconds
    return status


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Listener(Protocol):
    """Who is told how far a run is: the operator, or the terminal of `finetune run`."""

    def begins(self, micro_batch: int) -> None: ...
    def due(self) -> bool: ...
    def progress(self, progress: ProgressStatus) -> bool: ...


class Reporter:
    """Posts to the operator's report server, beside the training; says nothing when there is no server. Of several
    processes the first one speaks for all.
    """

    def __init__(self, spec: RunSpec, token: Path = TOKEN, ca: Path = CA, interval: float = INTERVAL) -> None:
        self.url = spec.report_url if os.environ.get("RANK", "0") == "0" else None
        self.job, self.token, self.ca, self.interval = spec.job, token, ca, interval
        self._last = -interval
        self._sending: threading.Thread | None = None
        self._warned = False

    def due(self) -> bool:
        """Whether a progress report may be sent now."""
        idle = self._sending is None or not self._sending.is_alive()
        return bool(self.url) and idle and time.monotonic() - self._last >= self.interval

    def progress(self, progress: ProgressStatus) -> bool:
        """Send progress if it is time; returns whether it is on its way."""
        if not self.due():
            return False
        self._last = time.monotonic()
        progress = progress.model_copy(update={"reported_at": now()})
        body = {
            "job": self.job,
            "trainerStatus": trainer_status(progress),
            "progress": progress.model_dump(mode="json", by_alias=True, exclude_none=True),
        }
        self._send(body)
        return True

    def loads(self) -> None:
        """Tell that the base model is fetched and loaded."""
        self._send({"job": self.job, "loading": True})

    def begins(self, micro_batch: int) -> None:
        """Tell that the base model is loaded, and how many rows are computed at once from here on: what follows when
        memory runs out depends on both.
        """
        self._send({"job": self.job, "loading": False, "microBatch": micro_batch})

    def waits(self, what: str) -> None:
        """Tell what the object store is waited for; an empty text: it answers again. Sent at once, so that the order
        stays: whoever calls has waited for longer.
        """
        if self.url:
            self._post({"job": self.job, "waitsFor": what[:MAX_WAITS_FOR]})

    def result(self, result: Result) -> bool:
        """Send the final Result, a few times if need be; returns whether the operator took it."""
        if not self.url:
            return False
        if self._sending is not None:
            self._sending.join(TIMEOUT)
        body = {"job": self.job, "result": json.loads(result.wire())}
        pause = threading.Event()
        for attempt in range(RESULT_ATTEMPTS):
            if self._post(body):
                return True
            if attempt + 1 < RESULT_ATTEMPTS:
                pause.wait(2**attempt * 0.5)
        log.warning("report: the operator did not take the result; it will read it from the termination message")
        return False

    def _send(self, body: dict[str, Any]) -> None:
        """Post beside the work, after what is being posted now."""
        if self.url:
            before = self._sending
            self._sending = threading.Thread(target=self._post_after, args=(before, body), daemon=True, name="report")
            self._sending.start()

    def _post_after(self, before: threading.Thread | None, body: dict[str, Any]) -> None:
        if before is not None:
            before.join()
        self._post(body)

    def _post(self, body: dict[str, Any]) -> bool:
        headers = {"Content-Type": "application/json"}
        try:
            headers["Authorization"] = f"Bearer {self.token.read_text().strip()}"
        except OSError:
            pass  # outside a cluster there is none
        request = urllib.request.Request(str(self.url), json.dumps(body).encode(), headers)
        context = ssl.create_default_context(cafile=str(self.ca)) if self.ca.exists() else None
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT, context=context):
                return True
        except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
            if not self._warned:
                log.warning("report: %s: %s; training goes on", self.url, error)
                self._warned = True
            return False
