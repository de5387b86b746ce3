"""A run from its first second to what is left of it: success, reuse, deletion, and all that can interrupt it."""

from __future__ import annotations

import json
import os
import signal

import pytest

from e2e.cases.conftest import Apply
from e2e.cases.handles import Handle
from e2e.cases.node import process_of
from e2e.cases.objects import finetune, training
from e2e.cluster.layout import SYSTEM_NAMESPACE
from e2e.cluster.target import target
from e2e.kubectl import Kubectl, Object, is_true

LONG = 240  # steps: long enough to be interrupted on a quiet machine, where ten take a second
INTERRUPT_AT = 8
CHECKPOINTS: Object = {"checkpoint": {"every": 5}}


def train_pod(tune: Handle) -> Object:
    """The pod that trains now."""

    def running(pods: dict[str, Object]) -> Object | None:
        found = [pod for pod in pods.values() if pod["status"].get("phase") == "Running"]
        return found[0] if found else None

    selector = f"finetune.dev/finetune={tune.name},finetune.dev/stage=train"
    return tune.kubectl.wait_until(
        "pods", "-n", tune.namespace, "-l", selector, ready=running, timeout=120, what=f"a training pod of {tune}"
    )


def test_a_run_succeeds_and_says_what_it_made(namespace: str, kubectl: Kubectl, apply: Apply, seed: int) -> None:
    dataset = {"train": {"configMap": {"name": "rows", "key": "train.jsonl"}}, "evaluation": {"fraction": 0.2}}
    tune = apply(finetune("first", namespace, seed, dataset=dataset))
    status = tune.wait_true("Complete")["status"]
    assert status["phase"] == "Succeeded"
    assert status["progress"]["step"] == status["progress"]["totalSteps"] == 4
    assert status["dataset"]["format"] == "Messages"
    assert status["adapter"]["digest"].startswith("sha256:")
    assert status["adapter"]["rank"] == 8
    assert status["adapter"]["trainableParameters"] > 0
    assert status["evaluation"]["adapter"]["loss"] < status["evaluation"]["base"]["loss"]
    table = kubectl.run("get", "finetunes", "-n", namespace)
    assert table.splitlines()[0].split() == ["NAME", "PHASE", "PROGRESS", "LOSS", "EVAL", "ETA", "ADAPTER", "AGE"]
    assert "4/4" in table
    assert status["adapter"]["digest"][7:19] in table


def test_the_same_inputs_a_second_time_need_no_training(namespace: str, apply: Apply, seed: int) -> None:
    first = apply(finetune("once", namespace, seed)).wait_true("Complete")["status"]
    again = apply(finetune("again", namespace, seed))
    complete = again.wait_true("Complete")
    reason = next(c["reason"] for c in complete["status"]["conditions"] if c["type"] == "Complete")
    assert reason == "ReusedExisting"
    assert complete["status"]["adapter"]["digest"] == first["adapter"]["digest"]
    assert again.stages() == ["prepare"]


def test_deleting_a_finetune_removes_all_that_it_owns(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    tune = apply(finetune("gone", namespace, seed, steps=LONG))
    tune.wait_step(2)
    tune.delete()
    kubectl.wait_gone("finetune/gone", "-n", namespace)
    kubectl.wait_gone("jobs,pods", "-l", "finetune.dev/finetune=gone", "-n", namespace, timeout=150)
    own = [kind for kind in ("jobs", "pods", "configmaps", "secrets", "leases") if tune.owned(kind)]
    assert own == []


def test_a_deleted_pod_is_followed_by_one_that_goes_on(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    tune = apply(finetune("deleted-pod", namespace, seed, steps=LONG, **CHECKPOINTS))
    tune.wait_step(INTERRUPT_AT)
    pod = train_pod(tune)
    kubectl.run("delete", "pod", pod["metadata"]["name"], "-n", namespace, "--force", "--grace-period=0")
    status = tune.wait_true("Complete")["status"]
    assert status["run"]["resumedFromStep"] >= 5
    assert status["progress"]["step"] == LONG


def test_a_killed_process_is_followed_by_one_that_goes_on(namespace: str, apply: Apply, seed: int) -> None:
    if not target().embedded:
        pytest.skip("kill -9 needs the node's processes; only the embedded cluster's node is this machine")
    tune = apply(finetune("killed", namespace, seed, steps=LONG, **CHECKPOINTS))
    tune.wait_step(INTERRUPT_AT)
    os.kill(process_of(train_pod(tune)["metadata"]["uid"], b"finetune_trainer"), signal.SIGKILL)
    status = tune.wait_true("Complete")["status"]
    assert status["run"]["resumedFromStep"] >= 5
    assert status["run"]["attempt"] == 2
    assert status["progress"]["step"] == LONG


def test_suspend_frees_the_gpu_and_going_on_costs_nothing(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    tune = apply(finetune("paused", namespace, seed, steps=LONG, **CHECKPOINTS))
    tune.wait_step(INTERRUPT_AT)
    tune.patch({"suspend": True})
    tune.wait_true("Suspended")
    kubectl.wait_gone(
        "pods", "-l", "finetune.dev/finetune=paused,finetune.dev/stage=train", "-n", namespace, timeout=150
    )
    stopped = tune.status["progress"]["step"]
    tune.patch({"suspend": False})
    status = tune.wait_true("Complete")["status"]
    # SIGTERM leaves a checkpoint of the step it came in, not of the last multiple of five.
    assert status["run"]["resumedFromStep"] >= stopped - 1
    assert status["run"]["infrastructureRetries"] == 0


def test_an_edit_during_a_run_cancels_it_and_starts_the_new_one(namespace: str, apply: Apply, seed: int) -> None:
    tune = apply(finetune("edited", namespace, seed, steps=LONG))
    old = tune.wait_step(2)["status"]["run"]
    tune.patch({"training": training(seed, steps=3)})

    def other_run(found: Object) -> Object | None:
        return found if is_true(found, "Complete") and found["status"]["run"]["id"] != old["id"] else None

    status = tune.wait("the new run is complete", other_run)["status"]
    assert status["progress"]["totalSteps"] == 3
    assert "Cancelled" in json.dumps(status["history"])
    left = {job["metadata"]["labels"]["finetune.dev/inputs"] for job in tune.owned("jobs")}
    assert left == {status["run"]["inputs"]}


def test_an_edit_that_changes_no_weights_restarts_nothing(namespace: str, apply: Apply, seed: int) -> None:
    tune = apply(finetune("same", namespace, seed, steps=40))
    before = tune.wait_step(2)["status"]["run"]
    tune.patch({"retry": {"infrastructure": 2}})
    after = tune.wait_true("Complete")["status"]["run"]
    assert (after["id"], after["attempt"]) == (before["id"], 1)


def test_a_run_survives_a_restart_of_the_operator(namespace: str, kubectl: Kubectl, apply: Apply, seed: int) -> None:
    tune = apply(finetune("restarted", namespace, seed, steps=LONG))
    tune.wait_step(2)
    selector = "app.kubernetes.io/name=finetune-operator,app.kubernetes.io/component=operator"
    kubectl.run("delete", "pods", "-n", SYSTEM_NAMESPACE, "-l", selector, "--force", "--grace-period=0")
    status = tune.wait_true("Complete")["status"]
    assert status["run"]["attempt"] == 1
    assert tune.stages() == ["prepare", "train"]
    kubectl.run(
        "rollout", "status", "deployment/finetune-operator", "-n", SYSTEM_NAMESPACE, "--timeout=120s", timeout=150
    )
