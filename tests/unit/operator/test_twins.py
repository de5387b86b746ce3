"""Of FineTunes that ask for the same run, one trains."""

import datetime as dt
from types import SimpleNamespace
from typing import Any

from finetune_operator.finetune import twins
from finetune_operator.kube import FINETUNES
from finetune_operator.queue import Key

ONE, TWO = Key(FINETUNES.kind, "ns", "one"), Key(FINETUNES.kind, "ns", "two")


class Empty:
    """A cluster whose objects do not show yet what was decided a moment ago."""

    async def list(self, *_: object) -> list[dict[str, Any]]:
        return []


def context() -> Any:
    settings = SimpleNamespace(watch_namespaces=())
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return SimpleNamespace(kube=Empty(), settings=settings, claims={}, now=lambda: now)


async def test_of_two_that_come_at_once_one_trains_and_the_other_waits_for_it() -> None:
    shared = context()
    assert await twins.claim(shared, ONE, "run", None) is None
    assert await twins.claim(shared, TWO, "run", None) == ONE
    assert await twins.claim(shared, ONE, "run", None) is None


async def test_in_another_bucket_there_is_nothing_to_wait_for() -> None:
    shared = context()
    assert await twins.claim(shared, ONE, "run", "s3://here") is None
    assert await twins.claim(shared, TWO, "run", "s3://there") is None
