"""The Jobs as they are created: golden files show them whole, and Kubernetes' published schema checks them.

`UPDATE_GOLDEN=1 pytest tests/unit/operator/test_jobs.py` writes the files anew; read the difference before committing it.
"""

import json
import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from finetune_operator.api.finetune import FineTune
from finetune_operator.api.tracking import Tracking
from finetune_operator.finetune import jobs
from finetune_operator.settings import Settings
from finetune_trainer.runspec import RunSpec, Stage
from tests.unit.operator.wrappers import SETTINGS, Object, finetune, prepared, stored, trained

GOLDEN = Path(__file__).parent / "golden"

EVERYTHING: Object = {
    "baseModel": {"huggingFace": {"repo": "acme/base", "tokenSecretRef": {"name": "hub", "key": "token"}}},
    "dataset": {
        "train": {"huggingFace": {"repo": "acme/data", "tokenSecretRef": {"name": "hub", "key": "data"}}},
        "evaluation": {"configMap": {"name": "held-out", "key": "eval.jsonl"}},
    },
    "resources": {"gpus": 1, "cpu": "4", "memory": "32Gi", "sharedMemory": "8Gi", "gpuMemory": "24Gi"},
    "podTemplate": {
        "labels": {"team": "support", "finetune.dev/stage": "not-yours"},
        "annotations": {"example.com/cost-center": "42"},
        "nodeSelector": {"gpu": "a100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "batch",
        "runtimeClassName": "nvidia",
        "serviceAccountName": "trainer",
        "imagePullSecrets": [{"name": "registry"}],
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}, {"name": "HOME", "value": "/not-yours"}],
    },
    "output": {
        "s3": {"uri": "s3://team-a/finetune", "credentialsSecretRef": {"name": "team-a-storage"}},
        "exports": ["Merged"],
        "hub": {"repo": "acme/bot", "content": "Merged", "tokenSecretRef": {"name": "hub", "key": "write"}},
    },
    "tracking": {
        "mlflow": {"uri": "https://mlflow.example", "experiment": "bots", "credentialsSecretRef": {"name": "mlflow"}},
        "wandb": {"project": "bots", "entity": "acme", "apiKeySecretRef": {"name": "wandb", "key": "api-key"}},
    },
    "queueName": "gpus",
}


def build(parent: FineTune, stage: Stage, settings: Settings = SETTINGS, attempt: int = 1, **changes: Any) -> Object:
    name = jobs.job_name("bot", stage, "0123456789abcdef", attempt)
    spec: RunSpec = jobs.run_spec(
        parent, stage, name, settings, attempt=attempt, inputs="0123456789abcdef", trainer_image="trainer:1", **changes
    )
    return jobs.job(parent, spec, settings)


def training(parent: FineTune, **changes: Any) -> Object:
    before = stored(build(parent, "prepare"))
    return build(parent, "train", prepared=prepared(before).prepared, **changes)


def exporting(parent: FineTune, settings: Settings = SETTINGS) -> Object:
    before = stored(build(parent, "prepare"))
    made = trained(stored(training(parent))).trained
    return build(parent, "export", settings, prepared=prepared(before).prepared, trained=made)


WITH_HUB = SETTINGS.model_copy(
    update={
        "hugging_face": SETTINGS.hugging_face.model_copy(update={"endpoint": "http://hub.example"}),
        "reports": SETTINGS.reports.model_copy(update={"ca_config_map": "finetune-ca"}),
    }
)

CASES: dict[str, Object] = {
    "prepare-smallest": build(finetune(), "prepare"),
    "train-smallest": training(finetune()),
    "prepare-everything": build(finetune(**EVERYTHING), "prepare", WITH_HUB),
    "train-two-nodes": training(finetune(resources={"gpus": 2, "nodes": 2, "sharedMemory": "8Gi"})),
    "train-everything": training(finetune(**EVERYTHING), micro_batch=4, attempt=2),
    "export-everything": exporting(finetune(**EVERYTHING), WITH_HUB),
}


def readable(job: Object) -> str:
    """The Job as YAML, with its run spec unfolded."""
    shown = json.loads(json.dumps(job))
    annotations = shown["spec"]["template"]["metadata"]["annotations"]
    annotations["finetune.dev/run-spec"] = json.loads(annotations["finetune.dev/run-spec"])
    return yaml.safe_dump(shown, sort_keys=False, width=120)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_job_is_as_in_the_golden_file(name: str) -> None:
    file = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(readable(CASES[name]))
    assert readable(CASES[name]) == file.read_text()


@pytest.mark.parametrize("name", CASES)
def test_the_job_is_valid_by_kubernetes_own_schema(name: str) -> None:
    kubernetes_validate.validate(CASES[name], "1.35", strict=True)


@pytest.mark.parametrize("name", CASES)
def test_the_pod_needs_no_more_than_the_restricted_profile(name: str) -> None:
    spec = CASES[name]["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    allowed = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected"}
    assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True


def environment(job: Object) -> Object:
    return {v["name"]: v for v in job["spec"]["template"]["spec"]["containers"][0]["env"]}


def test_hub_tokens_reach_the_prepare_job_and_never_the_gpu_pod() -> None:
    assert "FINETUNE_BASE_MODEL_HF_TOKEN" in environment(CASES["prepare-everything"])
    assert not [name for name in environment(CASES["train-everything"]) if "TOKEN" in name and "HF" in name]
    assert "HF_ENDPOINT" not in environment(CASES["train-everything"])


TRACKERS = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"}


def test_credentials_of_trackers_reach_the_train_job_and_no_pod_waits_for_them() -> None:
    assert [name for name, job in CASES.items() if TRACKERS & environment(job).keys()] == ["train-everything"]
    held = environment(CASES["train-everything"])
    assert all(held[name]["valueFrom"]["secretKeyRef"]["optional"] for name in TRACKERS)
    assert held["WANDB_API_KEY"]["valueFrom"]["secretKeyRef"]["key"] == "api-key"


def test_the_charts_trackers_hold_where_the_spec_has_none() -> None:
    chart = Tracking.model_validate({"mlflow": {"uri": "http://mlflow.mlops:5000"}})
    settings = SETTINGS.model_copy(update={"tracking": chart})

    def asked(**spec: Any) -> Object | None:
        job = build(finetune(**spec), "train", settings)
        text = job["spec"]["template"]["metadata"]["annotations"]["finetune.dev/run-spec"]
        found: Object | None = json.loads(text).get("tracking")
        return found

    assert asked() == {"mlflow": {"uri": "http://mlflow.mlops:5000"}}
    assert asked(tracking={}) is None
    assert asked(tracking={"mlflow": {"uri": "https://other"}}) == {"mlflow": {"uri": "https://other"}}


def test_the_token_that_writes_to_the_hub_reaches_the_export_job_and_no_other() -> None:
    holders = [name for name, job in CASES.items() if "FINETUNE_OUTPUT_HF_TOKEN" in environment(job)]
    assert holders == ["export-everything"]
    assert "FINETUNE_BASE_MODEL_HF_TOKEN" not in environment(CASES["export-everything"])


def test_a_merge_asks_for_the_memory_that_the_weights_need() -> None:
    def memory(**output: Any) -> str:
        job = exporting(finetune(output=output))
        return str(job["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["memory"])

    before = prepared(stored(build(finetune(), "prepare"))).prepared
    assert before is not None and before.base_model.parameters == 5_000_000
    assert memory(exports=["Merged"]) == memory(exports=["GGUF"]) == memory(exports=["Merged", "GGUF"]) == "3Gi"
    assert memory(hub={"repo": "acme/bot", "tokenSecretRef": {"name": "hub"}}) == "2Gi"


def test_no_secret_value_is_in_a_job_only_references() -> None:
    for job in CASES.values():
        credentials = [v for v in environment(job).values() if "KEY" in v["name"] or "TOKEN" in v["name"]]
        assert credentials and all(v["valueFrom"]["secretKeyRef"] for v in credentials)


def test_what_is_ours_wins_over_the_pod_template() -> None:
    template = CASES["train-everything"]["spec"]["template"]
    assert template["metadata"]["labels"]["finetune.dev/stage"] == "train"
    assert template["metadata"]["labels"]["team"] == "support"
    assert environment(CASES["train-everything"])["HOME"] == {"name": "HOME", "value": "/work/home"}


def test_a_gpu_is_asked_for_by_the_train_job_only() -> None:
    def limits(name: str) -> Object:
        answer: Object = CASES[name]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        return answer

    assert limits("train-everything")["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits("prepare-everything")
    assert "nvidia.com/gpu" not in limits("export-everything")


def test_a_run_on_the_cpu_asks_for_no_gpu() -> None:
    resources = training(finetune(resources={"gpus": 0}))["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources == {"requests": {"cpu": "1", "memory": "2Gi"}}


def test_the_longest_name_still_fits_a_pod() -> None:
    assert len(jobs.job_name("n" * 40, "prepare", "0123456789abcdef", 99)) <= 63


def test_a_volume_is_mounted_read_only_and_only_where_it_is_read() -> None:
    claim = {"persistentVolumeClaim": {"claimName": "models", "path": "llama"}}
    parent = finetune(baseModel=claim, dataset={"train": {"persistentVolumeClaim": {"claimName": "data"}}})
    mounts = {
        stage: {m["mountPath"]: m for m in job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
        for stage, job in {"prepare": build(parent, "prepare"), "train": training(parent)}.items()
    }
    assert mounts["prepare"]["/data/train"]["readOnly"] and mounts["prepare"]["/data/base-model"]["readOnly"]
    assert "/data/base-model" in mounts["train"] and "/data/train" not in mounts["train"]


def test_the_trainer_can_read_the_run_spec_that_it_is_given() -> None:
    text = CASES["train-everything"]["spec"]["template"]["metadata"]["annotations"]["finetune.dev/run-spec"]
    spec = RunSpec.model_validate_json(text)
    assert (spec.stage, spec.attempt, spec.micro_batch, spec.job) == ("train", 2, 4, "bot-train-01234567-2")
    assert spec.storage.uri == "s3://team-a/finetune"
    assert spec.prepared is not None and spec.prepared.total_steps == 40
