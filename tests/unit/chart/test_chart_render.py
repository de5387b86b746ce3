"""What `helm template` gives for the value sets that people use."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from finetune_operator.settings import Settings, load

VALUE_SETS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "trying it out": {
        "images": {"registry": "127.0.0.1:5000/ml", "engine": {"repository": "127.0.0.1:5000/ml/engine"}},
        "engine": {"extraArgs": ["--enforce-eager"], "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
        "minio": {"enabled": True, "persistence": {"enabled": False}, "buckets": ["finetune", "models", "datasets"]},
        "pretendGPUs": True,
    },
    "everything on": {
        "minio": {"enabled": True, "persistence": {"storageClassName": "fast"}},
        "networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {}}]},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "reports": {"tlsSecret": "finetune-operator-tls", "caConfigMap": "finetune-operator-ca"},
        "priorityClassName": "system-cluster-critical",
        "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example.com:3128"}],
        "images": {"pullSecrets": ["registry"], "trainer": {"digest": "sha256:" + "a" * 64}},
        "podAnnotations": {"example.com/a": "b"},
        "podLabels": {"team": "ml"},
        "pricePerGpuHour": 2.5,
        "tracking": {
            "mlflow": {"uri": "http://mlflow.mlops:5000", "credentialsSecretRef": {"name": "mlflow"}},
            "wandb": {"baseUrl": "https://wandb.example.com", "apiKeySecretRef": {"name": "wandb", "key": "api-key"}},
        },
    },
    "two namespaces": {"watchNamespaces": ["team-a", "team-b"], "replicas": 1},
    "only the operator": {
        "crds": {"enabled": False},
        "rbac": {"create": False},
        "serviceAccount": {"create": False, "name": "given"},
    },
}
value_sets = pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())


def find(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name)


def settings_of(documents: list[dict[str, Any]]) -> str:
    return str(find(documents, "ConfigMap", "finetune-operator-settings")["data"]["settings.yaml"])


def test_helm_lint_finds_nothing(lint: Callable[[], None]) -> None:
    lint()


@value_sets
def test_every_object_is_valid_for_kubernetes(render: Callable[..., list[dict[str, Any]]], values: Any) -> None:
    for document in render(values):
        if document["apiVersion"].startswith("monitoring.coreos.com/"):
            continue  # not a built-in kind
        kubernetes_validate.validate(document, "1.35", strict=True)


@value_sets
def test_rendering_twice_gives_the_same_text(template: Callable[..., str], values: Any) -> None:
    assert template(values) == template(values)


@value_sets
def test_names_are_unique_and_labels_are_ours(render: Callable[..., list[dict[str, Any]]], values: Any) -> None:
    documents = render(values)
    names = Counter((d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents)
    assert [name for name, count in names.items() if count > 1] == []
    for document in documents:
        if document["kind"] != "CustomResourceDefinition":
            assert document["metadata"]["labels"]["app.kubernetes.io/part-of"] == "finetune-operator"


@value_sets
def test_the_operator_accepts_the_rendered_settings(
    render: Callable[..., list[dict[str, Any]]], values: Any, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(settings_of(render(values)))
    settings = load(file)
    assert settings.reports.url.endswith("://finetune-operator-reports.finetune-system.svc:8090")
    assert list(settings.watch_namespaces) == values.get("watchNamespaces", [])
    assert settings.pretend_gpus is values.get("pretendGPUs", False)
    assert settings.price_per_gpu_hour == values.get("pricePerGpuHour")


def test_every_setting_is_set_by_the_chart_or_has_one_good_value(render: Callable[..., list[dict[str, Any]]]) -> None:
    rendered = yaml.safe_load(settings_of(render(VALUE_SETS["everything on"])))
    known = Settings.model_json_schema(by_alias=True)
    unset = set(known["properties"]) - set(rendered)
    assert unset == {"workers", "resyncSeconds", "healthPort"}
    for key, part in rendered.items():
        if isinstance(part, dict):
            model = (
                known["$defs"][known["properties"][key]["$ref"].rpartition("/")[2]]
                if "$ref" in known["properties"][key]
                else {}
            )
            assert set(model.get("properties", part)) - set(part) <= {"port"}, key


def test_the_bundled_minio_is_the_default_endpoint(render: Callable[..., list[dict[str, Any]]]) -> None:
    bundled = yaml.safe_load(settings_of(render(VALUE_SETS["trying it out"])))
    assert bundled["storage"]["endpoint"] == "http://minio.finetune-system:9000"
    given = {"minio": {"enabled": True}, "storage": {"endpoint": "https://s3.example.com"}}
    assert yaml.safe_load(settings_of(render(given)))["storage"]["endpoint"] == "https://s3.example.com"


def test_images_get_registry_tag_and_digest(render: Callable[..., list[dict[str, Any]]]) -> None:
    digest = "sha256:" + "a" * 64
    values = {
        "images": {
            "registry": "registry.example.com/ml/",
            "agent": {"tag": "v2"},
            "trainer": {"tag": "v2", "digest": digest},
        }
    }
    images = yaml.safe_load(settings_of(render(values)))["images"]
    assert images["agent"] == "registry.example.com/ml/agent:v2"
    assert images["trainer"] == f"registry.example.com/ml/trainer@{digest}"
    assert images["engine"].startswith("vllm/vllm-openai:")


def test_new_settings_restart_the_operator(render: Callable[..., list[dict[str, Any]]]) -> None:
    def checksum(values: dict[str, Any]) -> str:
        pod = find(render(values), "Deployment", "finetune-operator")["spec"]["template"]
        return str(pod["metadata"]["annotations"]["checksum/settings"])

    assert checksum({}) == checksum({"replicas": 1})
    assert checksum({}) != checksum({"storage": {"uri": "s3://elsewhere"}})


def test_the_reports_service_leaves_its_endpoints_to_the_leader(render: Callable[..., list[dict[str, Any]]]) -> None:
    service = find(render(), "Service", "finetune-operator-reports")
    assert "selector" not in service["spec"]
    assert [(p["name"], p["port"]) for p in service["spec"]["ports"]] == [("reports", 8090)]


def test_report_certificates_make_the_url_https(render: Callable[..., list[dict[str, Any]]]) -> None:
    documents = render(VALUE_SETS["everything on"])
    reports = yaml.safe_load(settings_of(documents))["reports"]
    assert reports["url"].startswith("https://")
    pod = find(documents, "Deployment", "finetune-operator")["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert reports["certFile"].startswith(mounts["tls"]) and reports["keyFile"].startswith(mounts["tls"])


def test_one_replica_has_no_disruption_budget(render: Callable[..., list[dict[str, Any]]]) -> None:
    assert "PodDisruptionBudget" in {d["kind"] for d in render()}
    assert "PodDisruptionBudget" not in {d["kind"] for d in render({"replicas": 1})}


def test_minio_has_its_buckets_when_it_starts(render: Callable[..., list[dict[str, Any]]]) -> None:
    pod = find(render(VALUE_SETS["trying it out"]), "Deployment", "minio")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    folders = [mount["subPath"] for mount in container["volumeMounts"] if "subPath" in mount]
    assert folders == ["finetune", "models", "datasets"]
    # Below /data a mount would be another device to MinIO, which renames files into its buckets.
    assert not [m for m in container["volumeMounts"] if m["mountPath"].startswith("/data/")]
    assert json.dumps(pod).count("secretKeyRef") == 2, "root credentials come from a Secret"


def test_a_new_release_leaves_the_bundled_minio_running(render: Callable[..., list[dict[str, Any]]]) -> None:
    def pod(values: dict[str, Any]) -> Any:
        return find(render({**VALUE_SETS["trying it out"], **values}), "Deployment", "minio")["spec"]["template"]

    images = {name: {"tag": "another"} for name in ("operator", "trainer", "agent", "engine")}
    assert pod({}) == pod({"images": images, "logLevel": "debug", "replicas": 1})
    assert "0.1.0" not in json.dumps(pod({})["metadata"])


def test_crds_are_kept_on_uninstall_unless_told_otherwise(render: Callable[..., list[dict[str, Any]]]) -> None:
    def policies(values: dict[str, Any]) -> list[str | None]:
        crds = [d for d in render(values) if d["kind"] == "CustomResourceDefinition"]
        return [d["metadata"].get("annotations", {}).get("helm.sh/resource-policy") for d in crds]

    assert policies({}) == ["keep", "keep"]
    assert policies({"crds": {"keep": False}}) == [None, None]
    assert policies({"crds": {"enabled": False}}) == []
