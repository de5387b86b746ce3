"""Leader election on a Lease: of the replicas exactly one works, and another takes over within 20 s of its death.

The promise "two operators never act at once" rests on three numbers. A rival waits LEASE_SECONDS after it last saw
the lease change. We count from before we *sent* a renewal, stop writing after FENCE_SECONDS without one, and no write
takes longer than kube.WRITE_SECONDS: FENCE_SECONDS + WRITE_SECONDS < LEASE_SECONDS.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable

from finetune_operator import metrics
from finetune_operator.kube import LEASES, ApiError, Kube, Object
from finetune_operator.times import micro_time, utc_now

log = logging.getLogger(__name__)

LEASE_SECONDS = 15
FENCE_SECONDS = 10.0
RENEW_SECONDS = 2.0
# How often a follower looks: it adds to the time of a takeover.
WATCH_SECONDS = 1.0


class NotLeading(Exception):
    """This process may not write (any more): the lease was not renewed in time."""


class Lease:
    def __init__(self, kube: Kube, namespace: str, name: str, identity: str) -> None:
        """`kube` must not be fenced by this lease. `identity` must be new for every process, even in the same pod."""
        self._kube, self._namespace, self._name, self.identity = kube, namespace, name, identity
        self._lease: Object = {}
        self._renewed_at: float | None = None
        self._change_seen: tuple[str, float] = ("", 0.0)
        self.last_contact = 0.0

    def held(self) -> bool:
        return self._renewed_at is not None and time.monotonic() - self._renewed_at < FENCE_SECONDS

    def fence(self) -> None:
        """Raise NotLeading unless this process may write now; called before every write."""
        if not self.held():
            raise NotLeading(f"lease {self._namespace}/{self._name} is not held by {self.identity}")

    async def acquire(self) -> None:
        """Wait until the lease is ours."""
        while not await self._unless_unreachable(self._try_to_acquire):
            await asyncio.sleep(WATCH_SECONDS)
        metrics.leading.set(1)
        log.info("leading as %s", self.identity)

    async def keep(self) -> None:
        """Renew until the lease is lost, then return."""
        while self.held():
            await asyncio.sleep(RENEW_SECONDS)
            await self._unless_unreachable(self._renew)
        metrics.leading.set(0)

    async def release(self) -> None:
        """Let a follower take over at once instead of in LEASE_SECONDS."""
        if not self.held():
            return
        self._renewed_at = None
        metrics.leading.set(0)
        self._lease["spec"].update(holderIdentity="", leaseDurationSeconds=1, renewTime=micro_time(utc_now()))
        try:
            await self._kube.replace(LEASES, self._lease)
        except ApiError as error:
            log.warning("lease not released, a follower waits %s s: %s", LEASE_SECONDS, error)

    async def _unless_unreachable(self, step: Callable[[], Awaitable[bool]]) -> bool:
        try:
            done = await step()
        except ApiError as error:
            log.warning("lease: %s", error)
            return False
        self.last_contact = time.monotonic()
        return done

    async def _try_to_acquire(self) -> bool:
        before = time.monotonic()
        lease = await self._kube.get(LEASES, self._namespace, self._name)
        try:
            if lease is None:
                metadata = {"namespace": self._namespace, "name": self._name}
                self._lease = await self._kube.create(LEASES, self._body(metadata, transitions=0))
            elif self._expired(lease):
                transitions = lease["spec"].get("leaseTransitions", 0) + 1
                self._lease = await self._kube.replace(LEASES, self._body(lease["metadata"], transitions))
            else:
                return False
        except ApiError as error:
            if error.status == 409:  # another follower was faster
                return False
            raise
        self._renewed_at = before
        return True

    async def _renew(self) -> bool:
        before = time.monotonic()
        self._lease["spec"]["renewTime"] = micro_time(utc_now())
        try:
            self._lease = await self._kube.replace(LEASES, self._lease)
        except ApiError as error:
            if not error.conflict and error.status != 404:
                raise
            lease = await self._kube.get(LEASES, self._namespace, self._name)
            if lease is None or lease["spec"].get("holderIdentity") != self.identity:
                log.error("the lease was taken by %s", lease and lease["spec"].get("holderIdentity"))
                self._renewed_at = None
                return False
            self._lease = lease  # somebody wrote a label; the lease is still ours
            return False
        self._renewed_at = before
        return True

    def _expired(self, lease: Object) -> bool:
        """By our own clock since we saw it change: clocks of two nodes are never compared."""
        spec = lease.get("spec", {})
        if not spec.get("holderIdentity"):
            return True
        version = lease["metadata"]["resourceVersion"]
        if self._change_seen[0] != version:
            self._change_seen = (version, time.monotonic())
        return time.monotonic() - self._change_seen[1] > int(spec.get("leaseDurationSeconds", LEASE_SECONDS))

    def _body(self, metadata: Object, transitions: int) -> Object:
        now = micro_time(utc_now())
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": metadata,
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": LEASE_SECONDS,
                "acquireTime": now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }


async def lead(lease: Lease, work: Callable[[], Awaitable[None]]) -> None:
    """Wait for the lease, run `work` while it is held, and release it when `work` ends.

    A lost lease ends the process on the spot: nothing that is under way in it may reach the API server any more.
    """
    await lease.acquire()
    keeping = asyncio.create_task(lease.keep(), name="lease")
    working = asyncio.ensure_future(work())
    try:
        await asyncio.wait({keeping, working}, return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            log.critical("the lease is lost, leaving")
            logging.shutdown()
            os._exit(1)
        await working
    finally:
        keeping.cancel()
        working.cancel()
        await asyncio.gather(keeping, working, return_exceptions=True)
        await lease.release()
