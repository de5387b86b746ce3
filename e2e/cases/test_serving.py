"""Adapters in service: verified, swapped without a failed request, merged, and taken away."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from e2e.cases.conftest import Apply, make_namespace
from e2e.cases.handles import SERVING_LIMIT, Handle
from e2e.cases.objects import adapter_deployment, finetune, training
from e2e.cases.traffic import QUESTION, Client
from e2e.demo.chat import AskFailed, ask, base_model_name, call
from e2e.kubectl import Kubectl, Object, is_true

NAMESPACE = "e2e-serving"
STEPS = 20


@pytest.fixture(scope="module")
def bot(kubectl: Kubectl) -> Iterator[Handle]:
    """A FineTune and an AdapterDeployment that follows it, both called `bot`; all tests here share them, in order."""
    make_namespace(kubectl, NAMESPACE)
    kubectl.apply(
        finetune("bot", NAMESPACE, random.SystemRandom().randrange(2**31), steps=STEPS),
        adapter_deployment("bot", NAMESPACE, follows="bot"),
    )
    yield Handle(kubectl, "adapterdeployment", "bot", NAMESPACE)
    kubectl.run("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture
def ready(bot: Handle) -> Handle:
    bot.wait_true("Ready", timeout=SERVING_LIMIT)
    return bot


@pytest.fixture
def address(ready: Handle) -> Iterator[str]:
    with ready.kubectl.port_forward(NAMESPACE, "service/bot", 80) as address:
        yield address


def followed(bot: Handle) -> Handle:
    return Handle(bot.kubectl, "finetune", "bot", NAMESPACE)


def short_digest(bot: Handle) -> str:
    return str(followed(bot).status["adapter"]["digest"])[7:19]


def engine_pod(bot: Handle) -> Object:
    (pod,) = bot.owned("pods")
    return pod


def restarts(pod: Object) -> int:
    status = pod["status"]
    containers = [*(status.get("initContainerStatuses") or []), *status["containerStatuses"]]
    return sum(container["restartCount"] for container in containers)


def test_the_stable_name_answers_with_the_digest_that_was_trained(address: str, bot: Handle) -> None:
    assert ask(address, "bot", QUESTION).model == f"bot@{short_digest(bot)}"
    status = bot.status
    (served,) = status["adapters"]
    assert served["servedDigest"] == served["desiredDigest"]
    assert status["url"] == f"http://bot.{NAMESPACE}.svc"


def test_the_base_model_answers_under_its_own_name_and_otherwise(address: str, bot: Handle) -> None:
    base = ask(address, base_model_name(address), QUESTION)
    assert "@" not in base.model
    assert base.text != ask(address, "bot", QUESTION).text


def test_clients_cannot_load_or_unload_adapters(address: str, bot: Handle) -> None:
    for path, body in {
        "/v1/load_lora_adapter": {"lora_name": "evil", "lora_path": "/tmp"},
        "/v1/unload_lora_adapter": {"lora_name": f"bot@{short_digest(bot)}"},
    }.items():
        with pytest.raises(AskFailed, match="HTTP 40[34]"):
            call(address, path, body)
    assert ask(address, "bot", QUESTION).model == f"bot@{short_digest(bot)}"


def test_two_finetunes_run_beside_it(ready: Handle, apply: Apply, seed: int) -> None:
    tunes = [apply(finetune(f"beside-{n}", NAMESPACE, seed + n)) for n in (1, 2)]
    for tune in tunes:
        tune.wait_true("Complete")
    assert is_true(ready.get(), "Ready")
    assert restarts(engine_pod(ready)) == 0


def test_a_new_adapter_is_swapped_in_without_restart_or_failed_request(address: str, bot: Handle, seed: int) -> None:
    old, pod = short_digest(bot), engine_pod(bot)
    tune = followed(bot)
    with Client(address, "bot") as client:
        tune.patch({"training": training(seed, steps=STEPS)})
        tune.wait_phase("Training")
        # While the next adapter is made, the last one answers.
        assert ask(address, "bot", QUESTION).model == f"bot@{old}"

        def swapped(found: Object) -> bool | None:
            adapters = found.get("status", {}).get("adapters") or [{}]
            digest = adapters[0].get("servedDigest") or ""
            return (is_true(found, "Ready") and digest[7:19] not in ("", old)) or None

        bot.wait("the new adapter is served", swapped)
        new = short_digest(bot)
        while f"bot@{new}" not in client.answered_by[-1:]:
            client.answered_by.append(ask(address, "bot", QUESTION).model)
    assert client.failures == []
    assert set(client.answered_by) == {f"bot@{old}", f"bot@{new}"}
    after = engine_pod(bot)
    assert after["metadata"]["uid"] == pod["metadata"]["uid"]
    assert restarts(after) == 0


def test_a_restarted_pod_is_ready_only_with_its_adapter(ready: Handle, kubectl: Kubectl) -> None:
    before = engine_pod(ready)["metadata"]["name"]
    kubectl.run("delete", "pod", before, "-n", NAMESPACE, "--force", "--grace-period=0")

    def another(found: dict[str, Object]) -> Object | None:
        fresh = [pod for name, pod in found.items() if name != before and is_true(pod, "Ready")]
        return fresh[0] if fresh else None

    selection = ("pods", "-n", NAMESPACE, "-l", "finetune.dev/adapterdeployment=bot")
    kubectl.wait_until(*selection, ready=another, timeout=SERVING_LIMIT, what="another engine pod Ready")
    with kubectl.port_forward(NAMESPACE, "service/bot", 80) as address:
        assert ask(address, "bot", QUESTION).model == f"bot@{short_digest(ready)}"


def test_merge_serves_a_plain_model_under_the_same_names(ready: Handle, apply: Apply, kubectl: Kubectl) -> None:
    merged = apply(adapter_deployment("merged", NAMESPACE, follows="bot", mode="Merge"))
    merged.wait_true("Ready", timeout=SERVING_LIMIT)
    with kubectl.port_forward(NAMESPACE, "service/merged", 80) as address:
        answer = ask(address, "merged", QUESTION)
    assert answer.model == f"merged@{short_digest(ready)}"
    merged.delete()


def test_an_adapter_that_missed_its_gates_is_not_served(namespace: str, apply: Apply, seed: int) -> None:
    dataset = {"train": {"configMap": {"name": "rows", "key": "train.jsonl"}}, "evaluation": {"fraction": 0.2}}
    gates = {"gates": [{"metric": "loss", "max": 0.0001}]}
    tune = apply(finetune("missed", namespace, seed, steps=2, dataset=dataset, evaluation=gates))
    deployment = apply(adapter_deployment("missed", namespace, follows="missed"))
    assert tune.wait_true("Complete")["status"]["phase"] == "Succeeded"
    gate = next(c for c in tune.status["conditions"] if c["type"] == "GatePassed")
    assert gate["status"] == "False"
    blocked = deployment.wait_phase("Blocked")
    assert "GateNotPassed" in {c["reason"] for c in blocked["status"]["conditions"]}
    assert deployment.owned("pods") == []


def test_deleting_an_adapter_deployment_removes_all_that_it_owns(ready: Handle, kubectl: Kubectl) -> None:
    ready.delete()
    kubectl.wait_gone("adapterdeployment/bot", "-n", NAMESPACE)
    selector = "finetune.dev/adapterdeployment=bot"
    for kind in ("deployments", "services", "configmaps", "pods"):
        kubectl.wait_gone(kind, "-l", selector, "-n", NAMESPACE, timeout=120)
