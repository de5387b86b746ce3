"""What one pod said about itself last."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """`job` is the Job that owns the pod (empty for an agent), `body` what the pod sent."""

    pod: str
    pod_uid: str
    job: str
    job_uid: str
    body: dict[str, Any]
    received: dt.datetime
