"""The workers: each takes a key from the queue, has it reconciled, and decides when it is looked at again."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping

from finetune_operator import logs, metrics
from finetune_operator.context import Context
from finetune_operator.kube import ADAPTERDEPLOYMENTS, FINETUNES, ApiError
from finetune_operator.leader import NotLeading
from finetune_operator.queue import Key

log = logging.getLogger(__name__)

Reconcile = Callable[[Context, Key], Awaitable[float | None]]
# Somebody wrote the object between our read and our write: read it again, once the dust has settled.
CONFLICT_SECONDS = 0.05


class Workers:
    def __init__(self, context: Context, reconciles: Mapping[str, Reconcile]) -> None:
        """`reconciles` maps a kind to its reconcile function."""
        self._context, self._reconciles = context, reconciles
        self._since: dict[Key, float] = {}

    def longest_busy_seconds(self) -> float:
        return max((time.monotonic() - since for since in self._since.values()), default=0.0)

    async def run(self, count: int) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._work(), name=f"worker {number}")

    async def _work(self) -> None:
        queue = self._context.queue
        while True:
            key = await queue.get()
            self._since[key] = time.monotonic()
            try:
                with logs.about(key), metrics.reconcile_seconds.labels(key.kind).time():
                    result = await self.look_at(key)
                metrics.reconciles.labels(key.kind, result).inc()
            finally:
                self._since.pop(key, None)
                queue.done(key)

    async def look_at(self, key: Key) -> str:
        """Reconcile once; answers `ok`, `conflict` or `error` and has asked the queue for the next look."""
        queue = self._context.queue
        try:
            again = await self._reconciles[key.kind](self._context, key)
        except NotLeading as error:
            log.warning("%s", error)
            return "error"
        except ApiError as error:
            if error.conflict:
                queue.add_after(key, CONFLICT_SECONDS)
                return "conflict"
            if error.namespace_ending:
                log.info("namespace %s is being deleted", key.namespace)
                return "ok"
            log.warning("%s; again in %.1f s", error, queue.add_failed(key))
            return "error"
        except Exception:
            log.exception("unexpected; again in %.1f s", queue.add_failed(key))
            return "error"
        queue.forget_failures(key)
        if again is not None:
            queue.add_after(key, again)
        return "ok"


async def resync(context: Context, also: Callable[[], Awaitable[None]]) -> None:
    """Now and then look at every object, at no fixed beat: heals what a watch missed. `also` is called each time."""
    period = context.settings.resync_seconds
    while True:
        await asyncio.sleep(period * random.uniform(0.8, 1.2))
        try:
            for key in await _everything(context):
                context.queue.add_after(key, random.uniform(0, period / 10))
            await also()
        except (ApiError, NotLeading) as error:
            log.warning("resync: %s", error)


async def _everything(context: Context) -> list[Key]:
    keys = []
    for resource in (FINETUNES, ADAPTERDEPLOYMENTS):
        for namespace in context.settings.watch_namespaces or ("",):
            for item in await context.kube.list(resource, namespace):
                keys.append(Key(resource.kind, item["metadata"]["namespace"], item["metadata"]["name"]))
    return keys
