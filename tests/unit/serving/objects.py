"""Builders of the objects that the AdapterDeployment's tests talk about."""

import datetime as dt
from typing import Any

from finetune_operator import times
from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.api.finetune import FineTune
from finetune_operator.report import Report
from finetune_operator.serving import workloads
from finetune_operator.serving.plan import Plan, plan
from finetune_operator.serving.status import to_json
from finetune_operator.serving.view import view
from finetune_operator.settings import Settings
from finetune_serving.desired import Desired
from finetune_serving.routes import engine_name

Object = dict[str, Any]

NOW = dt.datetime(2026, 11, 22, 12, 0, 0, tzinfo=dt.UTC)
SETTINGS = Settings.model_validate(
    {
        "images": {"trainer": "registry.example/trainer:1", "agent": "registry.example/agent:1", "engine": "vllm:1"},
        "storage": {"uri": "s3://finetune", "endpoint": "http://minio.finetune-system:9000"},
    }
)
OLD, NEW, BASE, OTHER_BASE = ("sha256:" + text * 32 for text in ("aa", "bb", "ee", "ff"))


def later(seconds: float) -> dt.datetime:
    return NOW + dt.timedelta(seconds=seconds)


def uri(digest: str) -> str:
    return f"s3://finetune/adapters/{digest.removeprefix('sha256:')}"


def made(digest: str, passed: bool | None = True, base: str = BASE, rank: int = 16, **more: Any) -> Object:
    """An adapter as a FineTune's status holds it."""
    return {
        "uri": uri(digest),
        "digest": digest,
        "rank": rank,
        "gatePassed": passed,
        "baseModelUri": f"s3://finetune/models/{base.removeprefix('sha256:')}",
        "baseModelDigest": base,
        "runId": f"run-{digest[7:9]}",
        **more,
    }


def finetune(
    name: str = "bot", adapter: Object | None = None, history: tuple[Object, ...] = (), **more: Any
) -> FineTune:
    status = {"phase": "Succeeded", "history": [{**h, "result": "Succeeded"} for h in history], **more}
    return FineTune.model_validate(
        {
            "metadata": {"name": name, "namespace": "demo", "uid": f"uid-{name}"},
            "spec": {
                "baseModel": {"s3": {"uri": "s3://models/tiny-llama"}},
                "dataset": {"train": {"configMap": {"name": "data", "key": "train.jsonl"}}},
            },
            "status": {**status, **({"adapter": adapter} if adapter else {})},
        }
    )


def deployment(*adapters: Object, status: Object | None = None, **spec: Any) -> AdapterDeployment:
    """Follows FineTune `bot` unless told otherwise."""
    return AdapterDeployment.model_validate(
        {
            "metadata": {"name": "support-bot", "namespace": "demo", "uid": "uid-ad", "generation": 1},
            "spec": {"adapters": list(adapters) or [follows()], **spec},
            "status": status or {},
        }
    )


def follows(name: str = "support-bot", reference: str = "bot", **more: Any) -> Object:
    return {"name": name, "fineTuneRef": {"name": reference}, **more}


class World:
    """The children as a cluster would hold them, and one look at them after the other."""

    def __init__(self, parent: AdapterDeployment, *finetunes: FineTune, settings: Settings = SETTINGS) -> None:
        self.parent, self.settings = parent, settings
        self.finetunes = {f.metadata.name: f for f in finetunes}
        self.children: dict[str, Object] = {}
        self.pods: list[Object] = []
        self.reports: dict[str, Report] = {}
        self.explanations: dict[str, tuple[str, str]] = {}
        self.now = NOW

    def look(self) -> Plan:
        """Plan once and carry the plan out, as reconcile does."""
        seen = view(
            self.parent,
            self.finetunes,
            self.children.get("Deployment"),
            self.children.get("ConfigMap"),
            self.children.get("Service"),
            self.pods,
            self.reports,
            self.explanations,
            self.settings,
            self.now,
        )
        decided = plan(seen)
        for resource, manifest in decided.apply:
            before = self.children.get(resource.kind, {})
            generation = before.get("metadata", {}).get("generation", 0) + 1
            meta = {**manifest["metadata"], "generation": generation}
            self.children[resource.kind] = {**manifest, "metadata": meta, "status": before.get("status", {})}
        for resource, _ in decided.delete:
            del self.children[resource.kind]
        document = {
            "metadata": self.parent.metadata.model_dump(by_alias=True),
            "spec": self.parent.spec.model_dump(by_alias=True, exclude_none=True),
            "status": to_json(decided.status),
        }
        self.parent = AdapterDeployment.model_validate(document)
        return decided

    def settle(self) -> Plan:
        """Looks until nothing changes any more."""
        for _ in range(5):
            before, decided = self.parent.status, self.look()
            if decided.status == before and not decided.apply:
                return decided
        raise AssertionError("the plan does not come to rest")

    def spec(self, **changes: Any) -> None:
        document = self.parent.spec.model_dump(by_alias=True, exclude_none=True)
        self.parent = (
            deployment(
                status=self.parent.status.model_dump(by_alias=True, exclude_none=True), **{**document, **changes}
            )
            if "adapters" not in changes
            else deployment(
                *changes.pop("adapters"),
                status=self.parent.status.model_dump(by_alias=True, exclude_none=True),
                **{k: v for k, v in {**document, **changes}.items() if k != "adapters"},
            )
        )

    def run_pods(self, count: int = 1, *, ready: bool = True, **status: Any) -> None:
        """The Deployment's pods of its newest template."""
        template = self.children["Deployment"]["spec"]["template"]
        generation = self.children["Deployment"]["metadata"]["generation"]
        self.pods = [
            {
                "metadata": {
                    "name": f"pod-{generation}-{number}",
                    "uid": f"uid-pod-{generation}-{number}",
                    "creationTimestamp": times.rfc3339(self.now),
                    "annotations": template["metadata"].get("annotations", {}),
                },
                "status": {
                    "phase": "Running",
                    "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
                    **status,
                },
            }
            for number in range(count)
        ]
        self.children["Deployment"]["status"] = {
            "observedGeneration": generation,
            "replicas": count,
            "updatedReplicas": count,
            "readyReplicas": count if ready else 0,
        }

    def report(
        self, number: int = 0, *, served: Object | None = None, ready: bool = True, trial: str = "", **adapters: Any
    ) -> None:
        """A pod's agent reports: `served` maps names to digests, `adapters` are states by digest letter, a or b.

        With a `trial`, digest b is a canary, and answers beside the served one while it is Ready.
        """
        pod = self.pods[number]["metadata"]
        states = [
            {
                "name": "support-bot",
                "digest": {"a": OLD, "b": NEW}[key],
                "trial": trial if key == "b" else "",
                "trialFailed": bool(trial) and value["state"] == "Failed",
                **value,
            }
            for key, value in adapters.items()
        ]
        routes = {n: [{"model": engine_name(n, d), "weight": 100}] for n, d in (served or {}).items()}
        if trial and adapters.get("b", {}).get("state") == "Ready":
            routes["support-bot"].append({"model": engine_name("support-bot", NEW), "weight": 900, "trial": trial})
        body = {"sequence": 1, "ready": ready, "adapters": states, "served": routes}
        self.reports[pod["name"]] = Report(pod["name"], pod["uid"], "", "", body, self.now)

    def desired(self) -> list[tuple[str, str, int]]:
        return [(adapter.name, adapter.digest, adapter.weight) for adapter in self._desired().adapters]

    def trial(self) -> str:
        """The trial that the agents are asked for; empty when there is none."""
        return next((adapter.trial for adapter in self._desired().adapters if adapter.trial), "")

    def _desired(self) -> Desired:
        return Desired.model_validate_json(self.children["ConfigMap"]["data"][workloads.DESIRED_KEY])

    def template(self) -> Object:
        found: Object = self.children["Deployment"]["spec"]["template"]
        return found


READY = {"state": "Ready", "logprobDelta": 0.5, "rank": 16}


def serving(digest: str = OLD, **spec: Any) -> World:
    """A world in which one pod serves one adapter."""
    world = World(deployment(**spec), finetune(adapter=made(digest)))
    world.settle()
    world.run_pods()
    world.report(served={"support-bot": digest}, **{"a" if digest == OLD else "b": READY})
    world.settle()
    return world
