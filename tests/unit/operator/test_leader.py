"""The lease: one holder, no clock of another machine, and no write without it."""

import asyncio
from typing import cast

import pytest

from finetune_operator import kube, leader
from finetune_operator.kube import Kube
from finetune_operator.leader import Lease, NotLeading, lead
from tests.unit.operator.memory_kube import MemoryKube

REAL = (leader.LEASE_SECONDS, leader.FENCE_SECONDS, leader.WATCH_SECONDS)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same proportions, forty times faster."""
    monkeypatch.setattr(leader, "LEASE_SECONDS", 1)
    monkeypatch.setattr(leader, "FENCE_SECONDS", 0.4)
    monkeypatch.setattr(leader, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leader, "WATCH_SECONDS", 0.02)


def lease(server: MemoryKube, identity: str) -> Lease:
    return Lease(cast(Kube, server), "finetune-system", "finetune-operator", identity)


def holder(server: MemoryKube) -> str:
    return str(server.objects["Lease", "finetune-system", "finetune-operator"]["spec"]["holderIdentity"])


def test_a_write_that_began_while_leading_has_ended_before_anybody_else_may_lead() -> None:
    lease_seconds, fence_seconds, watch_seconds = REAL
    assert fence_seconds + kube.WRITE_SECONDS < lease_seconds
    assert lease_seconds + 2 * watch_seconds < 20


async def test_the_first_to_come_leads_and_the_second_waits() -> None:
    server = MemoryKube()
    first, second = lease(server, "a"), lease(server, "b")
    await first.acquire()
    waiting = asyncio.ensure_future(second.acquire())
    keeping = asyncio.ensure_future(first.keep())
    await asyncio.sleep(1.5)
    assert first.held() and not second.held() and not waiting.done()
    keeping.cancel()
    waiting.cancel()


async def test_a_released_lease_is_taken_over_at_once() -> None:
    server = MemoryKube()
    first, second = lease(server, "a"), lease(server, "b")
    await first.acquire()
    await first.release()
    await asyncio.wait_for(second.acquire(), 0.3)
    assert holder(server) == "b"
    assert server.objects["Lease", "finetune-system", "finetune-operator"]["spec"]["leaseTransitions"] == 1


async def test_a_dead_leader_is_followed_after_its_lease_has_run_out() -> None:
    server = MemoryKube()
    await lease(server, "a").acquire()
    second = lease(server, "b")
    await asyncio.wait_for(second.acquire(), 2)
    assert holder(server) == "b"


async def test_a_leader_that_cannot_renew_may_not_write_long_before_anybody_else_may() -> None:
    server = MemoryKube()
    first = lease(server, "a")
    await first.acquire()
    first.fence()
    server.unreachable = True
    await asyncio.wait_for(first.keep(), 0.8)
    with pytest.raises(NotLeading, match="not held by a"):
        first.fence()


async def test_a_lease_that_somebody_labelled_is_still_ours() -> None:
    server = MemoryKube()
    first = lease(server, "a")
    await first.acquire()
    server._store(
        ("Lease", "finetune-system", "finetune-operator"),
        server.objects["Lease", "finetune-system", "finetune-operator"],
    )
    keeping = asyncio.ensure_future(first.keep())
    await asyncio.sleep(0.8)
    assert first.held() and not keeping.done()
    keeping.cancel()


async def test_a_lease_that_was_taken_is_lost_at_the_next_renewal() -> None:
    server = MemoryKube()
    first = lease(server, "a")
    await first.acquire()
    stolen = server.objects["Lease", "finetune-system", "finetune-operator"]
    stolen["spec"]["holderIdentity"] = "b"
    server._store(("Lease", "finetune-system", "finetune-operator"), stolen)
    await asyncio.wait_for(first.keep(), 0.3)
    assert not first.held()


async def test_the_lease_is_released_when_the_work_ends_and_its_error_is_passed_on() -> None:
    server = MemoryKube()
    first = lease(server, "a")

    async def work() -> None:
        assert first.held()
        raise RuntimeError("the work broke")

    with pytest.raises(RuntimeError, match="the work broke"):
        await lead(first, work)
    assert holder(server) == ""
