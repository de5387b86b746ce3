"""What every reconcile function is given besides the key of the object to look at."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_operator.events import Events
from finetune_operator.kube import Kube, Object
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.reports import Reports
from finetune_operator.settings import Settings


@dataclass(frozen=True)
class Context:
    """`async def reconcile(context, key) -> float | None` answers in how many seconds it wants to look again."""

    kube: Kube
    settings: Settings
    events: Events
    reports: Reports
    queue: WorkQueue
    now: Callable[[], dt.datetime]
    # Objects that were just created, as the watch brought them: the first look at an object needs no read.
    newborn: dict[Key, Object] = field(default_factory=dict)
    # By run id and bucket, who decided to train it and when: bridges the time until the status shows it (finetune/twins.py).
    claims: dict[tuple[str, str | None], tuple[Key, dt.datetime]] = field(default_factory=dict)
    # By uid, the resource version of our last write to an object: the event of that very write is no news.
    written: dict[str, str] = field(default_factory=dict)

    def wrote(self, answer: Object) -> None:
        """Remember a write by the API server's answer to it."""
        self.written[answer["metadata"]["uid"]] = answer["metadata"]["resourceVersion"]

    def is_own_write(self, event_type: str | None, meta: Mapping[str, Any]) -> bool:
        """Whether a watch event tells of nothing but our last write to the object."""
        if event_type == "DELETED":
            self.written.pop(meta["uid"], None)
            return False
        return bool(self.written.get(meta["uid"]) == meta["resourceVersion"])
