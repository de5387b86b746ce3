"""What becomes of a key after a look at its object."""

import asyncio
from typing import Any, cast

import pytest

from finetune_operator.context import Context
from finetune_operator.kube import ApiError
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.workers import Workers

BOT = Key("FineTune", "demo", "bot")
CONFLICT = ApiError("PUT", 409, "Conflict", "the object has been modified")
ENDING = ApiError(
    "POST", 403, "Forbidden", "unable to create new content in namespace demo because it is being terminated"
)


class Bench:
    """Workers whose reconcile function does what `outcome` says."""

    def __init__(self, outcome: Any) -> None:
        self.queue, self.looks = WorkQueue(), 0

        async def reconcile(context: Context, key: Key) -> float | None:
            self.looks += 1
            if isinstance(outcome, Exception):
                raise outcome
            answer: float | None = outcome
            return answer

        stub = type("Stub", (), {"queue": self.queue})()
        self.workers = Workers(cast(Context, stub), {"FineTune": reconcile})

    def comes_back(self) -> float | None:
        """At which time of the loop the key comes back, if it does."""
        timer = self.queue._timers.get(BOT)
        return None if timer is None else timer.when()


@pytest.mark.parametrize(
    ("outcome", "result", "seconds"),
    [
        (None, "ok", None),
        (30.0, "ok", 30.0),
        (CONFLICT, "conflict", 0.05),
        (ENDING, "ok", None),
        (ApiError("GET", 0, "TimeoutError", "no answer"), "error", 0.5),
        (RuntimeError("a mistake of ours"), "error", 0.5),
    ],
    ids=["done", "later", "conflict", "namespace ending", "unreachable", "bug"],
)
async def test_a_key_comes_back_when_there_is_a_reason(outcome: Any, result: str, seconds: float | None) -> None:
    bench, now = Bench(outcome), asyncio.get_running_loop().time
    before = now()
    assert await bench.workers.look_at(BOT) == result
    when = bench.comes_back()
    assert when is None if seconds is None else when is not None and before <= when - seconds <= now()


async def test_a_mistake_in_one_look_does_not_end_the_worker() -> None:
    bench = Bench(RuntimeError("a mistake of ours"))
    running = asyncio.ensure_future(bench.workers.run(1))
    for look in (1, 2):
        bench.queue.add(BOT)
        while bench.looks < look:
            await asyncio.sleep(0)
    await asyncio.sleep(0.02)  # for the second mistake to do its harm
    assert bench.looks == 2 and not running.done()
    assert bench.workers.longest_busy_seconds() == 0.0
    running.cancel()
