"""The children as they are applied: golden files show them whole, Kubernetes' published schema checks them.

`UPDATE_GOLDEN=1 pytest tests/unit/serving/test_workloads.py` writes the files anew; read the difference before committing.
"""

import json
import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from finetune_operator.serving import workloads
from finetune_operator.settings import Settings

from .objects import OLD, SETTINGS, Object, World, deployment, finetune, follows, made, uri

GOLDEN = Path(__file__).parent / "golden"

EVERYTHING: Object = {
    "replicas": 2,
    "engine": {
        "image": "vllm/vllm-openai:v0.32.0",
        "extraArgs": ["--gpu-memory-utilization=0.8"],
        "maxModelLength": 8192,
        "quantization": "bitsandbytes",
    },
    "probe": {"prompts": ["How do I reset my password?"], "minLogprobDelta": 0.01},
    "resources": {"gpus": 2, "cpu": "8", "memory": "64Gi", "sharedMemory": "8Gi"},
    "podTemplate": {
        "labels": {"team": "support", "finetune.dev/adapterdeployment": "not-yours"},
        "nodeSelector": {"gpu": "a100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "runtimeClassName": "nvidia",
        "serviceAccountName": "serving",
        "imagePullSecrets": [{"name": "registry"}],
        "env": [
            {"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "engine", "key": "api-key"}}},
            {"name": "PYTHONPATH", "value": "/not-yours"},
        ],
    },
    "service": {"type": "LoadBalancer", "labels": {"team": "support"}, "annotations": {"example.com/internal": "true"}},
}

CPU = Settings.model_validate(
    {
        **SETTINGS.model_dump(mode="json", by_alias=True),
        "engine": {"extraArgs": ["--dtype=float32"], "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
        "reports": {"caConfigMap": "finetune-ca"},
    }
)


def children(spec: Object, settings: Settings = SETTINGS, *adapters: Object) -> dict[str, Object]:
    world = World(deployment(*adapters, **spec), finetune(adapter=made(OLD)), settings=settings)
    return {resource.kind: manifest for resource, manifest in world.look().apply}


VOLUME = {"baseModel": {"persistentVolumeClaim": {"claimName": "models", "path": "llama/8b"}}}
ARTIFACT = {"name": "support-bot", "artifact": {"uri": uri(OLD), "digest": OLD}}
CASES: dict[str, dict[str, Object]] = {
    "mount-smallest": children({}),
    "mount-everything": children(EVERYTHING, SETTINGS, follows(), follows("second")),
    "mount-cpu-volume": children({**VOLUME, "resources": {"gpus": 0}}, CPU, ARTIFACT),
    "merge-smallest": children({"mode": "Merge"}),
    "merge-everything": children({**EVERYTHING, **VOLUME, "mode": "Merge"}, SETTINGS, ARTIFACT),
}
PAIRS = [(name, kind) for name, manifests in CASES.items() for kind in manifests]


def readable(manifests: dict[str, Object]) -> str:
    """All children as YAML, JSON documents inside them unfolded."""
    shown = json.loads(json.dumps(manifests))
    if "ConfigMap" in shown:
        data = shown["ConfigMap"]["data"]
        data[workloads.DESIRED_KEY] = json.loads(data[workloads.DESIRED_KEY])
    annotations = shown["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    if workloads.MERGE_SPEC in annotations:
        annotations[workloads.MERGE_SPEC] = json.loads(annotations[workloads.MERGE_SPEC])
    return yaml.safe_dump_all(shown.values(), sort_keys=False, width=150)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_set_is_as_in_its_golden_file(name: str) -> None:
    file, text = GOLDEN / f"{name}.yaml", readable(CASES[name])
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"{file.name} differs; UPDATE_GOLDEN=1 writes it anew"


@pytest.mark.parametrize("name, kind", PAIRS)
def test_kubernetes_published_schema_takes_it(name: str, kind: str) -> None:
    kubernetes_validate.validate(CASES[name][kind], "1.35", strict=True)


def containers(name: str) -> list[Object]:
    pod = CASES[name]["Deployment"]["spec"]["template"]["spec"]
    return [*pod["initContainers"], *pod["containers"]]


@pytest.mark.parametrize("name", CASES)
def test_pods_meet_the_restricted_security_profile(name: str) -> None:
    pod = CASES[name]["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    allowed = {"emptyDir", "configMap", "projected", "downwardAPI", "persistentVolumeClaim"}
    assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"])
    for container in containers(name):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("name", CASES)
def test_every_mount_has_its_volume_and_no_secret_is_spelled_out(name: str) -> None:
    pod = CASES[name]["Deployment"]["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in containers(name):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for variable in container["env"]:
            assert "value" not in variable or "SECRET" not in variable["name"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("mount")])
def test_no_adapter_is_named_in_the_template_of_a_mounting_pod(name: str) -> None:
    template = json.dumps(CASES[name]["Deployment"]["spec"]["template"])
    assert OLD[7:19] not in template, "a new adapter must not replace the pods"


def test_users_cannot_override_what_the_operator_sets() -> None:
    template = CASES["mount-everything"]["Deployment"]["spec"]["template"]
    assert template["metadata"]["labels"]["finetune.dev/adapterdeployment"] == "support-bot"
    engine = next(c for c in containers("mount-everything") if c["name"] == "engine")
    values: dict[str, Any] = {v["name"]: v.get("value") for v in engine["env"]}
    assert values["PYTHONPATH"] == "/finetune/python" and "VLLM_API_KEY" in values


def test_the_same_manifest_has_the_same_hash_and_another_one_has_not() -> None:
    once, again = (children({})["Deployment"]["metadata"]["annotations"][workloads.HASH] for _ in range(2))
    other = children({"replicas": 3})["Deployment"]["metadata"]["annotations"][workloads.HASH]
    assert once == again != other
