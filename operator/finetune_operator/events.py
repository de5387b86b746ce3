"""Kubernetes Events about our objects (events.k8s.io/v1): repeats become one Event with a count."""

from __future__ import annotations

import datetime as dt
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.event import Event
from finetune_operator.kube import EVENTS, FIELD_MANAGER, ApiError, Kube, Object
from finetune_operator.times import micro_time

log = logging.getLogger(__name__)

# What client-go does: an Event repeated within 6 minutes is a series, later it is a new Event.
SERIES_SECONDS = 360
REMEMBERED = 2048
NOTE_BYTES = 1024


@dataclass
class _Posted:
    namespace: str
    name: str
    count: int
    at: dt.datetime


class Events:
    def __init__(self, kube: Kube, instance: str, now: Callable[[], dt.datetime]) -> None:
        """`instance` names this process (its pod) in each Event."""
        self._kube, self._instance, self._now = kube, instance, now
        self._posted: OrderedDict[tuple[str, str, str], _Posted] = OrderedDict()

    async def record(self, regarding: Object, event: Event) -> None:
        """Post one Event about `regarding`. Never raises: an Event that cannot be posted is logged instead."""
        meta = regarding["metadata"]
        key = (meta.get("uid", ""), event.reason, event.note)
        now = self._now()
        posted = self._posted.get(key)
        try:
            if posted is not None and (now - posted.at).total_seconds() < SERIES_SECONDS:
                posted.count, posted.at = posted.count + 1, now
                series = {"series": {"count": posted.count, "lastObservedTime": micro_time(now)}}
                await self._kube.patch(EVENTS, posted.namespace, posted.name, series)
                return
            body = _body(regarding, event, self._instance, now)
            await self._kube.create(EVENTS, body)
            self._posted[key] = _Posted(body["metadata"]["namespace"], body["metadata"]["name"], 1, now)
            self._posted.move_to_end(key)
            if len(self._posted) > REMEMBERED:
                self._posted.popitem(last=False)
        except ApiError as error:
            # A namespace that is being deleted takes no new Events; an expired Event cannot be counted up.
            self._posted.pop(key, None)
            log.warning("event %s not posted: %s", event.reason, error)


def _body(regarding: Object, event: Event, instance: str, now: dt.datetime) -> Object:
    meta = regarding["metadata"]
    namespace = meta.get("namespace", "default")
    note = event.note.encode()[:NOTE_BYTES].decode(errors="ignore")
    return {
        "apiVersion": EVENTS.api_version,
        "kind": EVENTS.kind,
        "metadata": {"name": f"{meta['name'][:200]}.{uuid.uuid4().hex[:16]}", "namespace": namespace},
        "eventTime": micro_time(now),
        "reportingController": f"finetune.dev/{FIELD_MANAGER}",
        "reportingInstance": instance[:128],
        "type": event.type,
        "reason": event.reason[:128],
        "action": event.action[:128],
        "note": note,
        "regarding": {
            "apiVersion": regarding["apiVersion"],
            "kind": regarding["kind"],
            "namespace": namespace,
            "name": meta["name"],
            "uid": meta.get("uid", ""),
        },
    }
