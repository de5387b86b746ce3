"""A new adapter beside the one in service: its share, its time, and what ends it, on plans alone."""

from typing import Any

import pytest

from finetune_operator.api.adapterdeploymentstatus import CanaryStatus

from .objects import NEW, OLD, OTHER_BASE, READY, World, deployment, finetune, follows, later, made, serving

CANARY = {"weight": 20, "after": "10m"}
BROKEN = {"state": "Failed", "reason": "RequestsFailed", "message": "the engine failed to answer 1 request"}
SHARED = [("support-bot", OLD, 80), ("support-bot", NEW, 20)]


def trying(replicas: int = 1, **canary: Any) -> World:
    """OLD answers, NEW is to be tried."""
    world = serving(replicas=replicas)
    world.spec(adapters=[follows(canary={**CANARY, **canary})])
    world.settle()
    world.run_pods(replicas)
    for number in range(replicas):
        world.report(number, served={"support-bot": OLD}, a=READY)
    world.finetunes["bot"] = finetune(adapter=made(NEW))
    world.settle()
    return world


def running(replicas: int = 1) -> World:
    world = trying(replicas)
    for number in range(replicas):
        verified(world, number)
    world.settle()
    return world


def verified(world: World, number: int = 0) -> None:
    """A pod has proved the canary, and gives it its share."""
    world.report(number, served={"support-bot": OLD}, trial=world.trial(), a=READY, b=READY)


def canary(world: World) -> CanaryStatus:
    found = world.parent.status.adapters[0].canary
    assert found is not None
    return found


def test_a_canary_shares_the_requests_for_its_time_and_then_takes_over() -> None:
    world = trying()
    assert world.desired() == SHARED and canary(world).state == "Waiting"
    verified(world)
    decided = world.settle()
    assert (canary(world).state, canary(world).since, decided.again) == ("Running", "2026-11-22T12:00:00Z", 600)
    assert (decided.status.phase, decided.status.reason) == ("Progressing", "Canary")
    assert decided.status.message.endswith("gets 20 % of the requests until 2026-11-22T12:10:00Z")
    assert decided.status.adapters[0].served_digest == OLD, "it answers all that the canary does not"
    world.now = later(601)
    verified(world)
    world.settle()
    assert world.desired() == [("support-bot", NEW, 100), ("support-bot", OLD, 0)] and world.trial() == ""
    world.report(served={"support-bot": NEW}, a=READY, b=READY)
    assert world.settle().status.phase == "Ready"
    assert world.desired() == [("support-bot", NEW, 100)] and world.parent.status.adapters[0].canary is None


def test_its_time_begins_when_every_pod_has_it() -> None:
    world = trying(replicas=2)
    verified(world, 0)
    world.settle()
    assert canary(world).state == "Waiting"
    verified(world, 1)
    world.settle()
    assert canary(world).state == "Running"


def test_the_first_adapter_of_a_name_is_no_canary() -> None:
    world = World(deployment(follows(canary=CANARY)), finetune(adapter=made(NEW)))
    world.settle()
    assert world.desired() == [("support-bot", NEW, 100)] and world.trial() == ""


def test_another_base_model_replaces_the_pods_without_a_canary() -> None:
    world = serving()
    world.spec(adapters=[follows(canary=CANARY)])
    world.finetunes["bot"] = finetune(adapter=made(NEW, base=OTHER_BASE))
    world.settle()
    assert world.desired() == [("support-bot", NEW, 100)] and world.parent.status.adapters[0].canary is None


@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_on_one_pod_ends_the_trial_and_says_so_once(begun: bool) -> None:
    world = running(replicas=2) if begun else trying(replicas=2)
    world.report(1, served={"support-bot": OLD}, trial=world.trial(), a=READY, b=BROKEN)
    decided = world.look()
    assert (decided.status.phase, decided.status.reason) == ("Degraded", "CanaryFailed")
    assert [(event.type, event.reason) for event in decided.events] == [("Warning", "CanaryFailed")]
    assert "failed to answer 1 request" in decided.events[0].note and "change canary.weight" in decided.events[0].note
    for number in range(2):
        world.report(number, served={"support-bot": OLD}, a=READY)
    decided = world.settle()
    assert world.desired() == [("support-bot", OLD, 100)]
    assert (decided.status.reason, decided.events) == ("CanaryFailed", ())
    assert decided.status.adapters[0].message.startswith("RequestsFailed: ")
    verdicts = {c.type: (c.status, c.reason) for c in decided.status.conditions}
    assert verdicts["AdaptersVerified"] == verdicts["Ready"] == ("False", "CanaryFailed")


def failed() -> World:
    world = running()
    world.report(served={"support-bot": OLD}, trial=world.trial(), a=READY, b=BROKEN)
    world.settle()
    assert world.desired() == [("support-bot", OLD, 100)]
    return world


def test_a_trial_that_failed_stays_failed_whatever_time_goes_by_and_whoever_restarts() -> None:
    world = failed()
    world.now = later(3600)
    world.reports.clear()
    world.settle()
    assert world.desired() == [("support-bot", OLD, 100)] and canary(world).state == "Failed"
    world.spec(replicas=2)
    assert world.look().status.reason == "CanaryFailed" or canary(world).state == "Failed"


def test_another_weight_is_another_try_that_old_reports_say_nothing_about() -> None:
    world = failed()
    before = canary(world).trial
    world.spec(adapters=[follows(canary={**CANARY, "weight": 1})])
    world.settle()
    assert world.desired() == [("support-bot", OLD, 99), ("support-bot", NEW, 1)]
    assert canary(world).state == "Waiting" and world.trial() != before


def test_a_newer_adapter_is_tried_by_itself() -> None:
    world = failed()
    world.finetunes["bot"] = finetune(adapter=made("sha256:" + "cc" * 32))
    world.settle()
    assert [digest for _, digest, _ in world.desired()] == [OLD, "sha256:" + "cc" * 32]


def test_without_canary_in_the_spec_it_takes_all_at_once() -> None:
    world = failed()
    world.spec(adapters=[follows()])
    world.settle()
    assert world.desired() == [("support-bot", NEW, 100), ("support-bot", OLD, 0)]


def test_nothing_is_promoted_while_a_pod_says_nothing() -> None:
    world = running(replicas=2)
    world.now = later(601)
    verified(world, 0)
    world.settle()
    assert canary(world).state == "Running" and world.desired() == SHARED
    verified(world, 1)
    world.settle()
    assert world.desired()[0] == ("support-bot", NEW, 100)


def test_an_adapter_that_cannot_be_fetched_yet_has_not_failed_as_a_canary() -> None:
    world = trying()
    waits = {"state": "Failed", "reason": "StorageUnavailable", "message": "no answer", "trialFailed": False}
    world.report(served={"support-bot": OLD}, trial=world.trial(), a=READY, b=waits)
    decided = world.settle()
    assert decided.status.reason == "StorageUnavailable" and canary(world).state == "Waiting"
    assert world.desired() == SHARED
