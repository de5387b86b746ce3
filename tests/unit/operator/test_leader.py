"""The lease: one holder, no clock of another machine, and no write without it."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finetune_operator import kube, leader
from finetune_operator.kube import Kube
from finetune_operator.leader import Lease, NotLeading, lead
from tests.unit.operator.memory_kube import MemoryKube


class JumpingSelector(selectors.DefaultSelector):
    """Where nothing is left to do, time jumps to what is next."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0 if timeout else timeout)
        self.now += 0 if events else timeout or 0
        return events


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = JumpingSelector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


def in_jumping_time(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """The real seconds, of a clock that no slow machine can disturb."""

    @functools.wraps(test)
    def run() -> None:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            runner.run(test())

    return run


@pytest.fixture(autouse=True)
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(leader, "time", clock)


def lease(server: MemoryKube, identity: str) -> Lease:
    return Lease(cast(Kube, server), "finetune-system", "finetune-operator", identity)


def holder(server: MemoryKube) -> str:
    return str(server.objects["Lease", "finetune-system", "finetune-operator"]["spec"]["holderIdentity"])


def test_a_write_that_began_while_leading_has_ended_before_anybody_else_may_lead() -> None:
    assert leader.FENCE_SECONDS + kube.WRITE_SECONDS < leader.LEASE_SECONDS
    assert leader.LEASE_SECONDS + 2 * leader.WATCH_SECONDS < 20


@in_jumping_time
async def test_the_first_to_come_leads_and_the_second_waits() -> None:
    server = MemoryKube()
    first, second = lease(server, "a"), lease(server, "b")
    await first.acquire()
    waiting = asyncio.ensure_future(second.acquire())
    keeping = asyncio.ensure_future(first.keep())
    await asyncio.sleep(60)
    assert first.held() and not second.held() and not waiting.done()
    keeping.cancel()
    waiting.cancel()


@in_jumping_time
async def test_a_released_lease_is_taken_over_at_once() -> None:
    server = MemoryKube()
    first, second = lease(server, "a"), lease(server, "b")
    await first.acquire()
    await first.release()
    await asyncio.wait_for(second.acquire(), leader.WATCH_SECONDS)
    assert holder(server) == "b"
    assert server.objects["Lease", "finetune-system", "finetune-operator"]["spec"]["leaseTransitions"] == 1


@in_jumping_time
async def test_a_dead_leader_is_followed_after_its_lease_has_run_out() -> None:
    server = MemoryKube()
    await lease(server, "a").acquire()
    second = lease(server, "b")
    await asyncio.wait_for(second.acquire(), 20)
    assert holder(server) == "b"


@in_jumping_time
async def test_a_leader_that_cannot_renew_may_not_write_long_before_anybody_else_may() -> None:
    server = MemoryKube()
    first = lease(server, "a")
    await first.acquire()
    first.fence()
    server.unreachable = True
    await asyncio.wait_for(first.keep(), leader.FENCE_SECONDS + leader.RENEW_SECONDS)
    with pytest.raises(NotLeading, match="not held by a"):
        first.fence()


@in_jumping_time
async def test_a_lease_that_somebody_labelled_is_still_ours() -> None:
    server = MemoryKube()
    first = lease(server, "a")
    await first.acquire()
    server._store(
        ("Lease", "finetune-system", "finetune-operator"),
        server.objects["Lease", "finetune-system", "finetune-operator"],
    )
    keeping = asyncio.ensure_future(first.keep())
    await asyncio.sleep(60)
    assert first.held() and not keeping.done()
    keeping.cancel()


@in_jumping_time
async def test_a_lease_that_was_taken_is_lost_at_the_next_renewal() -> None:
    server = MemoryKube()
    first = lease(server, "a")
    await first.acquire()
    stolen = server.objects["Lease", "finetune-system", "finetune-operator"]
    stolen["spec"]["holderIdentity"] = "b"
    server._store(("Lease", "finetune-system", "finetune-operator"), stolen)
    await asyncio.wait_for(first.keep(), 2 * leader.RENEW_SECONDS)
    assert not first.held()


@in_jumping_time
async def test_the_lease_is_released_when_the_work_ends_and_its_error_is_passed_on() -> None:
    server = MemoryKube()
    first = lease(server, "a")

    async def work() -> None:
        assert first.held()
        raise RuntimeError("the work broke")

    with pytest.raises(RuntimeError, match="the work broke"):
        await lead(first, work)
    assert holder(server) == ""
