"""AdapterDeployments on a real API server with the operator as a process; the tests play kubelet and agent."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from . import kubelet
from .apiserver import ApiError, ApiServer, Client, Object
from .operator_process import Operator, install_rights, service_account_kubeconfig, until

OLD, NEW, BASE = ("sha256:" + text * 32 for text in ("aa", "bb", "ee"))
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def operator(kube: Client, api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    install_rights(kube)
    kubeconfig = service_account_kubeconfig(api_server, tmp_path_factory.mktemp("operator-rights"))
    process = Operator(tmp_path_factory.mktemp("operator"), kubeconfig).start().wait_until_leading()
    yield process
    process.kill()


def uri(digest: str) -> str:
    return f"s3://finetune/adapters/{digest.removeprefix('sha256:')}"


def made(digest: str, passed: bool = True, rank: int = 16) -> Object:
    return {
        "uri": uri(digest),
        "digest": digest,
        "rank": rank,
        "gatePassed": passed,
        "baseModelUri": "s3://models/tiny-llama",
        "baseModelDigest": BASE,
    }


class Tune:
    """A suspended FineTune: the operator leaves its adapter as the test writes it."""

    def __init__(self, kube: Client, namespace: str) -> None:
        self.kube = kube
        self.created = kube.create(
            {
                "apiVersion": "finetune.dev/v1alpha1",
                "kind": "FineTune",
                "metadata": {"name": "bot", "namespace": namespace},
                "spec": {
                    "suspend": True,
                    "baseModel": {"s3": {"uri": "s3://models/tiny-llama"}},
                    "dataset": {"train": {"configMap": {"name": "data", "key": "train.jsonl"}}},
                },
            }
        )
        path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunes/bot"
        until(lambda: kube.get(path).get("status", {}).get("phase") == "Suspended", "the FineTune is suspended")

    def has_made(self, adapter: Object) -> None:
        self.kube.merge(self.created, {"status": {"adapter": adapter}}, "status")


class Serving:
    """An AdapterDeployment and what became of it."""

    def __init__(self, kube: Client, namespace: str, *adapters: Object, **spec: Any) -> None:
        self.kube, self.namespace = kube, namespace
        follows = {"name": "support-bot", "fineTuneRef": {"name": "bot"}}
        self.created = kube.create(
            {
                "apiVersion": "finetune.dev/v1alpha1",
                "kind": "AdapterDeployment",
                "metadata": {"name": "support-bot", "namespace": namespace},
                "spec": {"adapters": list(adapters) or [follows], **spec},
            }
        )

    def get(self, path: str) -> Object | None:
        try:
            return self.kube.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def child(self, api: str, plural: str, name: str = "support-bot") -> Object | None:
        return self.get(f"/{api}/namespaces/{self.namespace}/{plural}/{name}")

    def deployment(self) -> Object:
        found: Object = until(lambda: self.child("apis/apps/v1", "deployments"), f"a Deployment; {self.status}")
        return {"apiVersion": "apps/v1", "kind": "Deployment", **found}

    def desired(self) -> Object:
        found = until(lambda: self.child("api/v1", "configmaps", "support-bot-adapters"), "a ConfigMap")
        document: Object = json.loads(found["data"]["desired.json"])
        return document

    @property
    def status(self) -> Object:
        path = f"/apis/finetune.dev/v1alpha1/namespaces/{self.namespace}/adapterdeployments/support-bot"
        status: Object = self.kube.get(path).get("status", {})
        return status

    def reaches(self, phase: str, reason: str = "") -> Object:
        def found() -> Object | None:
            status = self.status
            return status if status.get("phase") == phase and (not reason or status.get("reason") == reason) else None

        status: Object = until(found, f"{phase} {reason}; is {self.status}")
        return status

    def start_pod(self) -> Object:
        """A ready pod of the Deployment, as controllers and kubelet make it; and the Deployment's status."""
        deployment = self.deployment()
        template = deployment["spec"]["template"]
        pod = self.kube.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"support-bot-{next(_numbers)}",
                    "namespace": self.namespace,
                    "labels": template["metadata"]["labels"],
                },
                "spec": {"serviceAccountName": "default", **template["spec"], "nodeName": "node-1"},
            }
        )
        conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": kubelet.now()}]
        pod = kubelet.set_pod(self.kube, pod, phase="Running", startTime=kubelet.now(), conditions=conditions)
        counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 1)
        generation = deployment["metadata"]["generation"]
        self.kube.merge(deployment, {"status": {"observedGeneration": generation, **counts}}, "status")
        return pod

    def report(
        self,
        operator: Operator,
        pod: Object,
        digest: str,
        *others: str,
        ready: bool = True,
        broken: Object | None = None,
    ) -> Object:
        """The agent of `pod` says that `digest` answers and is verified, as are `others`; `broken` failed as a canary."""
        path = f"/apis/finetune.dev/v1alpha1/namespaces/{self.namespace}/adapterdeployments/support-bot/report"
        states = [
            {"name": "support-bot", "digest": d, "state": "Ready", "rank": 16, "logprobDelta": 0.5}
            for d in (digest, *others)
        ]
        if broken is not None:
            failure = {"state": "Failed", "reason": "RequestsFailed", "message": "CUDA error", "trialFailed": True}
            states.append({**broken, **failure})
        model = f"support-bot@{digest[7:19]}"
        body = {"ready": ready, "adapters": states, "served": {"support-bot": [{"model": model, "weight": 100}]}}
        status, answer = operator.report(path, kubelet.token_of(self.kube, pod), body)
        assert status == 200, answer
        return answer


def test_an_artifact_is_served_and_its_status_says_so(kube: Client, namespace: str, operator: Operator) -> None:
    artifact = {"name": "support-bot", "artifact": {"uri": uri(OLD), "digest": OLD}}
    served = Serving(kube, namespace, artifact, baseModel={"s3": {"uri": "s3://models/tiny-llama"}})
    assert served.reaches("Progressing")["url"] == f"http://support-bot.{namespace}.svc"
    service = served.child("api/v1", "services")
    assert service is not None and service["spec"]["ports"][0]["port"] == 80
    assert served.deployment()["metadata"]["ownerReferences"][0]["uid"] == served.created["metadata"]["uid"]
    pod = served.start_pod()
    answer = served.report(operator, pod, OLD)
    assert answer["adapters"] == served.desired()["adapters"]
    status = served.reaches("Ready")
    assert status["adapters"][0]["servedDigest"] == OLD and status["readyReplicas"] == 1
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "GatePassed": "True",
        "AdaptersVerified": "True",
        "Progressing": "False",
        "Ready": "True",
    }
    scale = kube.get(f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/adapterdeployments/support-bot/scale")
    assert (
        scale["status"]["replicas"] == 1 and "finetune.dev/adapterdeployment=support-bot" in scale["status"]["selector"]
    )


def test_a_new_adapter_of_a_finetune_reaches_the_agents_and_replaces_no_pod(
    kube: Client, namespace: str, operator: Operator
) -> None:
    tune, served = Tune(kube, namespace), Serving(kube, namespace)
    served.reaches("Pending", "NoAdapterYet")
    tune.has_made(made(OLD))
    pod = served.start_pod()
    served.report(operator, pod, OLD)
    served.reaches("Ready")
    before = served.deployment()
    tune.has_made(made(NEW))
    until(lambda: served.desired()["adapters"][0]["digest"] == NEW, "the new digest in the ConfigMap")
    assert [a["weight"] for a in served.desired()["adapters"]] == [100, 0]
    assert served.reaches("Progressing", "Swapping")["adapters"][0]["servedDigest"] == OLD
    assert served.report(operator, pod, OLD)["adapters"][0]["digest"] == NEW, "at once, in the answer"
    served.report(operator, pod, NEW, OLD)
    status = served.reaches("Ready")
    assert status["adapters"][0]["servedDigest"] == NEW
    assert [entry["digest"] for entry in status["history"]] == [NEW, OLD]
    after = served.deployment()
    assert after["metadata"]["generation"] == before["metadata"]["generation"]
    until(lambda: len(served.desired()["adapters"]) == 1, "the old digest leaves the set")


def test_a_canary_that_fails_falls_back_and_another_weight_tries_it_again(
    kube: Client, namespace: str, operator: Operator
) -> None:
    tune = Tune(kube, namespace)
    tune.has_made(made(OLD))
    spec = {"name": "support-bot", "fineTuneRef": {"name": "bot"}, "canary": {"weight": 50, "after": "1h"}}
    served = Serving(kube, namespace, spec)
    pod = served.start_pod()
    served.report(operator, pod, OLD)
    served.reaches("Ready")
    tune.has_made(made(NEW))
    until(lambda: len(served.desired()["adapters"]) == 2, "old and new in the ConfigMap")
    served.report(operator, pod, OLD, NEW)
    assert "gets 50 % of the requests until" in served.reaches("Progressing", "Canary")["message"]
    served.report(operator, pod, OLD, broken=served.desired()["adapters"][1])
    message = served.reaches("Degraded", "CanaryFailed")["message"]
    assert "RequestsFailed: CUDA error" in message and "change canary.weight" in message
    until(lambda: [a["digest"] for a in served.desired()["adapters"]] == [OLD], "the old digest alone")
    path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
    until(
        lambda: ("Warning", "CanaryFailed") in {(e["type"], e["reason"]) for e in kube.get(path)["items"]}, "the Event"
    )
    kube.merge(served.created, {"spec": {"adapters": [{**spec, "canary": {"weight": 51, "after": "1h"}}]}})
    until(lambda: [a["weight"] for a in served.desired()["adapters"]] == [49, 51], "another try")


def test_an_adapter_that_failed_its_gates_is_blocked_and_creates_nothing(
    kube: Client, namespace: str, operator: Operator
) -> None:
    Tune(kube, namespace).has_made(made(OLD, passed=False))
    served = Serving(kube, namespace)
    assert "passed its gates" in served.reaches("Blocked", "GateNotPassed")["message"]
    assert served.child("apis/apps/v1", "deployments") is None


def test_somebody_elses_deployment_of_that_name_is_left_alone(kube: Client, namespace: str, operator: Operator) -> None:
    labels = {"app": "theirs"}
    theirs = kube.create(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "support-bot", "namespace": namespace},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [{"name": "app", "image": "theirs:1"}]},
                },
            },
        }
    )
    artifact = {"name": "support-bot", "artifact": {"uri": uri(OLD), "digest": OLD}}
    served = Serving(kube, namespace, artifact, baseModel={"s3": {"uri": "s3://models/tiny-llama"}})
    assert "Deployment support-bot exists and is not ours" in served.reaches("Failed", "NameTaken")["message"]
    assert served.deployment()["metadata"]["resourceVersion"] == theirs["metadata"]["resourceVersion"]
    kube.delete(theirs)
    kube.merge(served.created, {"metadata": {"annotations": {"looked-at": "again"}}})
    served.reaches("Progressing")


def test_a_child_that_was_deleted_by_hand_comes_back(kube: Client, namespace: str, operator: Operator) -> None:
    artifact = {"name": "support-bot", "artifact": {"uri": uri(OLD), "digest": OLD}}
    served = Serving(kube, namespace, artifact, baseModel={"s3": {"uri": "s3://models/tiny-llama"}})
    first = served.deployment()
    kube.delete(first)
    until(
        lambda: served.deployment()["metadata"]["uid"] != first["metadata"]["uid"],
        "a new Deployment",
    )


def test_an_edit_of_the_engine_is_rolled_out_and_nothing_else_changes(
    kube: Client, namespace: str, operator: Operator
) -> None:
    artifact = {"name": "support-bot", "artifact": {"uri": uri(OLD), "digest": OLD}}
    served = Serving(kube, namespace, artifact, baseModel={"s3": {"uri": "s3://models/tiny-llama"}})
    before, desired = served.deployment(), served.desired()
    kube.merge(served.created, {"spec": {"engine": {"maxModelLength": 512}, "replicas": 3}})
    until(lambda: served.deployment()["spec"]["replicas"] == 3, "three replicas")
    engine = served.deployment()["spec"]["template"]["spec"]["containers"][0]
    assert "--max-model-len=512" in engine["args"]
    assert served.deployment()["metadata"]["uid"] == before["metadata"]["uid"] and served.desired() == desired
