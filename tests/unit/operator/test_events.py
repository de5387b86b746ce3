"""Events: one each, a count for repeats, and never an error."""

import datetime as dt
from typing import cast

from finetune_operator.event import Event
from finetune_operator.events import Events
from finetune_operator.kube import Kube, Object
from tests.unit.operator.memory_kube import MemoryKube
from tests.unit.operator.wrappers import NOW

PARENT: Object = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTune",
    "metadata": {"name": "bot", "namespace": "demo", "uid": "uid-bot"},
}


class Clock:
    def __init__(self) -> None:
        self.time = NOW

    def now(self) -> dt.datetime:
        return self.time


def events(server: MemoryKube, clock: Clock) -> Events:
    return Events(cast(Kube, server), "operator-0", clock.now)


def stored(server: MemoryKube) -> list[Object]:
    return [item for (kind, _, _), item in server.objects.items() if kind == "Event"]


async def test_an_event_says_who_saw_what_about_which_object() -> None:
    server = MemoryKube()
    await events(server, Clock()).record(PARENT, Event("Succeeded", "adapter is there"))
    (event,) = stored(server)
    assert event["regarding"]["uid"] == "uid-bot" and event["regarding"]["kind"] == "FineTune"
    assert (event["reason"], event["note"], event["type"]) == ("Succeeded", "adapter is there", "Normal")
    assert event["reportingController"] == "finetune.dev/finetune-operator"
    assert event["eventTime"] == "2026-11-22T12:00:00.000000Z"


async def test_repeats_are_counted_in_one_event() -> None:
    server, clock = MemoryKube(), Clock()
    recorder = events(server, clock)
    for _ in range(3):
        await recorder.record(PARENT, Event("Retrying", "again", "Warning"))
        clock.time += dt.timedelta(seconds=30)
    (event,) = stored(server)
    assert event["series"]["count"] == 3


async def test_what_is_said_again_much_later_is_a_new_event() -> None:
    server, clock = MemoryKube(), Clock()
    recorder = events(server, clock)
    await recorder.record(PARENT, Event("Retrying", "again"))
    clock.time += dt.timedelta(minutes=10)
    await recorder.record(PARENT, Event("Retrying", "again"))
    assert len(stored(server)) == 2


async def test_an_event_that_cannot_be_posted_is_no_error() -> None:
    server = MemoryKube()
    server.unreachable = True
    await events(server, Clock()).record(PARENT, Event("Succeeded", "adapter is there"))


async def test_a_long_note_is_cut_to_what_the_api_takes() -> None:
    server = MemoryKube()
    await events(server, Clock()).record(PARENT, Event("Failed", "ä" * 2000))
    assert len(stored(server)[0]["note"].encode()) <= 1024
