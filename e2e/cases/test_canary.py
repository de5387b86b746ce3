"""A canary under traffic: it gets its share, takes over when its time is over, and one that fails is dropped."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from e2e.cases.conftest import make_namespace
from e2e.cases.handles import SERVING_LIMIT, Handle
from e2e.cases.objects import adapter_deployment, finetune, training
from e2e.cases.traffic import QUESTION, Client
from e2e.demo.chat import ask
from e2e.kubectl import Kubectl, Object, is_true

NAMESPACE = "e2e-canary"
STEPS = 4
ASKED = 60


def adapters(weight: int, after: str) -> Object:
    return {"adapters": [{"name": "bot", "fineTuneRef": {"name": "bot"}, "canary": {"weight": weight, "after": after}}]}


@pytest.fixture(scope="module")
def tune(kubectl: Kubectl) -> Iterator[Handle]:
    make_namespace(kubectl, NAMESPACE)
    seed = random.SystemRandom().randrange(2**31)
    kubectl.apply(
        finetune("bot", NAMESPACE, seed, steps=STEPS),
        adapter_deployment("bot", NAMESPACE, follows="bot", **adapters(50, "24h")),
    )
    yield Handle(kubectl, "finetune", "bot", NAMESPACE)
    kubectl.run("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture(scope="module")
def bot(kubectl: Kubectl, tune: Handle) -> Handle:
    handle = Handle(kubectl, "adapterdeployment", "bot", NAMESPACE)
    handle.wait_true("Ready", timeout=SERVING_LIMIT)
    return handle


@pytest.fixture(scope="module")
def client(kubectl: Kubectl, bot: Handle) -> Iterator[Client]:
    """Traffic through all of it."""
    with kubectl.port_forward(NAMESPACE, "service/bot", 80) as address, Client(address, "bot", every=1.0) as client:
        yield client


def served(bot: Handle) -> str:
    (adapter,) = bot.status["adapters"]
    return f"bot@{adapter['servedDigest'][7:19]}"


def wanted(bot: Handle) -> str:
    (adapter,) = bot.status["adapters"]
    return f"bot@{adapter['desiredDigest'][7:19]}"


def answers(client: Client, count: int) -> Counter[str]:
    return Counter(ask(client.address, "bot", QUESTION, max_tokens=4).model for _ in range(count))


def canary_is(state: str, found: Object) -> Object | None:
    known = found.get("status", {}).get("adapters") or [{}]
    return found if (known[0].get("canary") or {}).get("state") == state else None


def test_a_new_adapter_gets_its_share_and_after_its_time_all(
    client: Client, bot: Handle, tune: Handle, seed: int
) -> None:
    old = served(bot)
    (pod,) = bot.owned("pods")
    tune.patch({"training": training(seed, steps=STEPS)})
    bot.wait("the canary runs", lambda found: canary_is("Running", found), SERVING_LIMIT)
    new = wanted(bot)
    assert new != old and served(bot) == old
    share = answers(client, ASKED)
    print(f"    with weight 50: {dict(share)}", flush=True)
    assert set(share) == {old, new} and ASKED / 6 < share[new] < ASKED * 5 / 6
    bot.patch(adapters(50, "1s"))
    bot.wait("the new adapter is served", lambda found: is_true(found, "Ready") and served(bot) == new or None)
    assert answers(client, 10) == {new: 10}
    (after,) = bot.owned("pods")
    assert after["metadata"]["uid"] == pod["metadata"]["uid"]
    assert client.failures == [] and set(client.answered_by) == {old, new}


def test_a_canary_that_proves_nothing_is_dropped_and_said_so(
    client: Client, bot: Handle, tune: Handle, seed: int
) -> None:
    good, answered = served(bot), len(client.answered_by)
    bot.patch({"probe": {"minLogprobDelta": 99}})  # no adapter changes the answers that much
    tune.patch({"training": training(seed, steps=STEPS)})
    degraded = bot.wait_phase("Degraded", SERVING_LIMIT)
    assert degraded["status"]["reason"] == "CanaryFailed" and canary_is("Failed", degraded)
    assert degraded["status"]["adapters"][0]["message"].startswith("NoEffect: ")
    assert wanted(bot) != good and served(bot) == good
    assert answers(client, 20) == {good: 20}
    assert client.failures == [] and set(client.answered_by[answered:]) == {good}
    told = bot.kubectl.items("events.events.k8s.io", "-n", NAMESPACE)
    assert "CanaryFailed" in {event["reason"] for event in told}
