"""Something to tell about an object: plans carry these, events.py posts them once the status is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Event:
    """`reason` is one CamelCase word, `note` one sentence."""

    reason: str
    note: str
    type: Literal["Normal", "Warning"] = "Normal"
    action: str = "Reconcile"
