"""The work queue has the semantics of controller-runtime's."""

import asyncio

from finetune_operator.queue import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Key, WorkQueue

A, B = Key("FineTune", "demo", "a"), Key("FineTune", "demo", "b")


async def test_a_key_added_twice_is_handed_out_once() -> None:
    queue = WorkQueue()
    queue.add(A)
    queue.add(A)
    queue.add(B)
    assert [await queue.get(), await queue.get()] == [A, B]
    assert len(queue) == 0


async def test_a_key_in_hand_is_not_handed_out_a_second_time_until_it_is_done() -> None:
    queue = WorkQueue()
    queue.add(A)
    assert await queue.get() == A
    queue.add(A)
    queue.add(B)
    assert await queue.get() == B
    waiting = asyncio.ensure_future(queue.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.done(A)
    assert await waiting == A


async def test_a_key_that_was_not_added_while_in_hand_is_forgotten_when_done() -> None:
    queue = WorkQueue()
    queue.add(A)
    queue.done(await queue.get())
    assert len(queue) == 0


async def test_add_after_waits_and_the_earlier_wish_stands() -> None:
    queue = WorkQueue()
    began = asyncio.get_running_loop().time()
    queue.add_after(A, 30)
    queue.add_after(A, 0.02)
    queue.add_after(A, 60)
    assert await asyncio.wait_for(queue.get(), 60) == A
    assert 0.015 < asyncio.get_running_loop().time() - began < 0.9


async def test_add_overrides_a_later_wish() -> None:
    queue = WorkQueue()
    queue.add_after(A, 30)
    queue.add(A)
    assert await asyncio.wait_for(queue.get(), 60) == A


async def test_failures_pause_longer_each_time_up_to_a_bound_and_success_resets_them() -> None:
    queue = WorkQueue()
    pauses = [queue.add_failed(A) for _ in range(12)]
    assert pauses[:3] == [FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    assert queue.add_failed(B) == FIRST_PAUSE_SECONDS
    queue.forget_failures(A)
    assert queue.add_failed(A) == FIRST_PAUSE_SECONDS
