"""The work queue: keys of objects to look at, each at most once in the queue and in one pair of hands at a time.

The semantics are those of controller-runtime's queue: a key that is added while it is being worked on is worked on
once more afterwards; a key that failed comes back after an exponentially growing pause.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from finetune_operator import metrics

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 300.0


class Key(NamedTuple):
    """Names one object: what a reconcile function is called with."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class WorkQueue:
    def __init__(self) -> None:
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._dirty: set[Key] = set()
        self._in_hand: set[Key] = set()
        self._failures: dict[Key, int] = {}
        # At most one timer per key: of two wishes the earlier one stands, since every look at an object ends with a
        # new wish if one is still needed.
        self._timers: dict[Key, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._dirty)

    def add(self, key: Key) -> None:
        """Have `key` looked at as soon as a worker is free."""
        self._stop_timer(key)
        if key in self._dirty:
            return
        metrics.queue_adds.labels(key.kind).inc()
        self._dirty.add(key)
        metrics.queue_depth.set(len(self._dirty))
        if key not in self._in_hand:
            self._ready.put_nowait(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Have `key` looked at in `seconds` from now, or earlier if something else asks for it."""
        if key in self._dirty:
            return
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= loop.time() + seconds:
            return
        self._stop_timer(key)
        self._timers[key] = loop.call_later(max(seconds, 0.0), self.add, key)

    def add_failed(self, key: Key) -> float:
        """Have `key` looked at again after a pause that doubles with every failure in a row; returns the pause."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 16), LONGEST_PAUSE_SECONDS)
        metrics.queue_retries.labels(key.kind).inc()
        self.add_after(key, pause)
        return pause

    def forget_failures(self, key: Key) -> None:
        self._failures.pop(key, None)

    async def get(self) -> Key:
        """Wait for a key; the caller must give it back with `done`."""
        key = await self._ready.get()
        self._dirty.discard(key)
        self._in_hand.add(key)
        metrics.queue_depth.set(len(self._dirty))
        return key

    def done(self, key: Key) -> None:
        self._in_hand.discard(key)
        if key in self._dirty:
            self._ready.put_nowait(key)

    def _stop_timer(self, key: Key) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
