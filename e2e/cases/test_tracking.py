"""A run in MLflow and Weights & Biases: one run however often it is interrupted, and no run is lost for a tracker."""

from __future__ import annotations

import base64

from e2e.cases.conftest import Apply
from e2e.cases.objects import finetune
from e2e.cases.trackers import start_trackers, what_it_has
from e2e.kubectl import Kubectl, Object

STEPS = 240
KEY = "0123456789" * 4


def secret(name: str, namespace: str, values: dict[str, str]) -> Object:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "data": data}


def test_a_suspended_run_is_one_run_in_each_tracker_and_no_step_is_there_twice(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    address = start_trackers(kubectl, namespace)
    kubectl.apply(secret("wandb", namespace, {"api-key": KEY}))
    tracking = {
        # This Secret is not there, and no pod waits for it.
        "mlflow": {"uri": address["mlflow"], "credentialsSecretRef": {"name": "nowhere"}},
        "wandb": {"baseUrl": address["wandb"], "apiKeySecretRef": {"name": "wandb", "key": "api-key"}},
    }
    tune = apply(finetune("tracked", namespace, seed, steps=STEPS, tracking=tracking, checkpoint={"every": 20}))
    tune.wait_step(8)
    tune.patch({"suspend": True})
    tune.wait_phase("Suspended")
    tune.patch({"suspend": False})
    status = tune.wait_true("Complete")["status"]

    told = {one["name"]: one for one in status["progress"]["tracking"]}
    assert not told["MLflow"].get("message") and not told["WandB"].get("message")
    assert told["MLflow"]["url"].startswith(f"{address['mlflow']}/#/experiments/")
    mlflow, wandb = (what_it_has(kubectl, namespace, kind) for kind in ("mlflow", "wandb"))
    assert mlflow["steps"] == wandb["steps"] == list(range(1, STEPS + 1))
    [run] = mlflow["runs"]
    assert (run["run_name"], run["status"]) == (f"{namespace}/tracked", "FINISHED")
    assert run["tags"]["finetune.dev/adapter"] == status["adapter"]["digest"]
    assert wandb["summary"]["finetune.dev/adapter"] == status["adapter"]["digest"]

    pods = kubectl.run("get", "pods", "-n", namespace, "-o", "yaml")
    logs = kubectl.run("logs", "-n", namespace, "-l", "finetune.dev/stage=train", "--tail=-1")
    assert KEY not in pods + logs + str(tune.get())


def test_a_tracker_that_is_not_there_is_told_of_and_the_run_succeeds(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    tracking = {"mlflow": {"uri": "http://nowhere.svc:5000"}}
    status = apply(finetune("untracked", namespace, seed, tracking=tracking)).wait_true("Complete")["status"]
    [told] = status["progress"]["tracking"]
    assert "4 of 4 steps are missing there" in told["message"]
    assert "TrackingIncomplete" in kubectl.run("get", "events", "-n", namespace)
