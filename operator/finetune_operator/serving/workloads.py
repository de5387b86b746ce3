"""Builds ConfigMap, Deployment and Service as plain dicts; everything that a pod is told is in its template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator import labels, podtemplate
from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.api.common import GROUP
from finetune_operator.serving.targets import Base, Target
from finetune_operator.settings import Settings
from finetune_serving.desired import Desired
from finetune_serving.routes import BASE, engine_name
from finetune_trainer.mergespec import MergeSpec
from finetune_trainer.runspec import Storage

Object = dict[str, Any]

ENGINE, AGENT, MERGE = "engine", "agent", "merge"
ENGINE_PORT, HEALTH_PORT = 8000, 8001
USER = 10001
STATE, MODELS, MERGED = "/finetune", "/models", "/models/merged"
DESIRED_KEY = "desired.json"
HASH = f"{GROUP}/hash"
MERGE_SPEC = f"{GROUP}/merge-spec"
DIGEST = f"{GROUP}/adapter-digest"

# vLLM arguments that this file sets, or that would open what the middleware closes.
OWN_ARGUMENTS = frozenset(
    [
        "--api-key",
        "--api-server-count",
        "--config",
        "--data-parallel-size",
        "--enable-lora",
        "--host",
        "--lora-modules",
        "--max-lora-rank",
        "--max-loras",
        "--max-cpu-loras",
        "--max-model-len",
        "--middleware",
        "--model",
        "--port",
        "--quantization",
        "--root-path",
        "--served-model-name",
        "--tensor-parallel-size",
        "--uds",
    ]
)

# An engine that loads a large model from a cold disk takes tens of minutes; the kubelet must not restart it meanwhile.
STARTUP_SECONDS = 3600
PERIOD_SECONDS = 2
#: vLLM's processes want 160 MiB to talk through; the container runtime gives 64.
SHARED_MEMORY = "1Gi"
#: Requests that are being answered when a pod is replaced are answered to their end.
GRACE_SECONDS = 120
#: The Service stops sending to a pod a moment after it was told to end.
DRAIN_SECONDS = 5


@dataclass(frozen=True)
class Limits:
    """What the engine's LoRA slots are sized for: the largest rank, and how many adapters are loaded at once."""

    rank: int
    adapters: int


def forbidden_arguments(parent: AdapterDeployment) -> list[str]:
    """Those of spec.engine.extraArgs that the operator sets itself."""
    names = [argument.split("=")[0].replace("_", "-") for argument in parent.spec.engine.extra_args]
    return [name for name in names if name in OWN_ARGUMENTS]


def selector(parent: AdapterDeployment) -> dict[str, str]:
    """The labels that pick the pods; a Deployment's selector can never be changed."""
    return labels.of_owner("AdapterDeployment", parent.metadata.name)


def config_map_name(parent: AdapterDeployment) -> str:
    return f"{parent.metadata.name}-adapters"


def config_map(parent: AdapterDeployment, desired: Desired) -> Object:
    """The durable form of the desired set; the agents read it whenever it changes."""
    body = json.dumps(desired.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(parent, config_map_name(parent)),
        "data": {DESIRED_KEY: body},
    }


def service(parent: AdapterDeployment) -> Object:
    """Port 80 of the pods that are Ready; its name is the host of status.url."""
    asked = parent.spec.service
    metadata = _metadata(parent, parent.metadata.name)
    metadata["labels"] = {**asked.labels, **metadata["labels"]}
    if asked.annotations:
        metadata["annotations"] = dict(asked.annotations)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "type": asked.type,
            "selector": selector(parent),
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def mount_deployment(
    parent: AdapterDeployment, base: Base, limits: Limits, storage: Storage, secret: str, settings: Settings
) -> Object:
    """Base model in the engine, adapters swapped by the agent: no digest of an adapter is in the template."""
    pod = _pod(parent, settings, {})
    gpus = parent.spec.resources.gpus
    pod["spec"]["initContainers"] = [_agent(parent, limits, storage, secret, base, settings)]
    pod["spec"]["containers"] = [
        _engine(
            parent,
            settings,
            base,
            # Two words: vLLM reads the file only so, and ignores --config=FILE without a word.
            ["--config", f"{STATE}/engine.yaml", f"--served-model-name={BASE}"]
            + ["--middleware=finetune_serving.middleware.AdapterMiddleware"],
            [
                {"name": "PYTHONPATH", "value": f"{STATE}/python"},
                {"name": "FINETUNE_STATE_DIR", "value": STATE},
                # Only behind the middleware, which lets nobody but the agent load anything.
                {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "True"},
                *([] if gpus else [{"name": "FINETUNE_REFUSE_PROMPT_LOGPROBS", "value": "true"}]),
            ],
            "/finetune/ready",
            [_mount("state", STATE), _mount("models", MODELS, read_only=True), *_base_mounts(base)],
        )
    ]
    pod["spec"]["volumes"] += [
        _empty("state"),
        {"name": "desired", "configMap": {"name": config_map_name(parent)}},
        _report_token(settings),
    ]
    pod["spec"]["volumes"] += _base_volumes(base)
    return _deployment(parent, pod)


def merge_deployment(
    parent: AdapterDeployment, base: Base, target: Target, storage: Storage, secret: str, settings: Settings
) -> Object:
    """Base and adapter become one model in an init step; the digest is in the template, so a new one rolls out."""
    spec = MergeSpec(
        name=target.name,
        storage=storage,
        base_uri=base.uri,
        base_digest=base.digest,
        adapter_uri=target.uri,
        adapter_digest=target.digest,
        gpus=parent.spec.resources.gpus,
        min_logprob_delta=parent.spec.probe.min_logprob_delta,
        prompts=list(parent.spec.probe.prompts),
        trust_remote_code=base.remote_code,
    )
    document = json.dumps(spec.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
    pod = _pod(parent, settings, {MERGE_SPEC: document, DIGEST: target.digest})
    served = [engine_name(target.name, target.digest), target.name]
    pod["spec"]["initContainers"] = [_merge(parent, base, secret, settings)]
    pod["spec"]["containers"] = [
        _engine(
            parent,
            settings,
            base,
            [f"--model={MERGED}", "--served-model-name", *served],
            [],
            "/health",
            [_mount("models", MODELS, read_only=True)],
        )
    ]
    field = {"path": "merge.json", "fieldRef": {"fieldPath": f"metadata.annotations['{MERGE_SPEC}']"}}
    pod["spec"]["volumes"] += [{"name": "merge-spec", "downwardAPI": {"items": [field]}}, *_base_volumes(base)]
    return _deployment(parent, pod)


def hashed(manifest: Object) -> Object:
    """The manifest with a hash of itself: one that carries the same hash need not be applied again."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), HASH: hashlib.sha256(text.encode()).hexdigest()[:16]}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


def _deployment(parent: AdapterDeployment, pod: Object) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(parent, parent.metadata.name),
        "spec": {
            "replicas": parent.spec.replicas,
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": STARTUP_SECONDS,
            "selector": {"matchLabels": selector(parent)},
            # A new pod is Ready before an old one goes: no request finds nobody.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": podtemplate.merge(parent.spec.pod_template, pod, ENGINE),
        },
    }


def _pod(parent: AdapterDeployment, settings: Settings, annotations: Mapping[str, str]) -> Object:
    """What pods of both modes have in common."""
    size = parent.spec.resources.shared_memory or SHARED_MEMORY
    shared = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}
    volumes = [_empty("models"), _empty("cache"), _empty("tmp"), shared]
    return {
        "metadata": {"labels": selector(parent), "annotations": dict(annotations)},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "imagePullSecrets": [{"name": name} for name in settings.images.pull_secrets],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumes": volumes,
        },
    }


def _engine(
    parent: AdapterDeployment,
    settings: Settings,
    base: Base,
    arguments: list[str],
    environment: list[Object],
    ready_path: str,
    mounts: list[Object],
) -> Object:
    """vLLM's OpenAI server, in the official image or any other; nothing in it is needed but vLLM."""
    asked, resources = parent.spec.engine, parent.spec.resources
    return {
        "name": ENGINE,
        "image": asked.image or settings.images.engine,
        "imagePullPolicy": settings.images.pull_policy,
        "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        "args": [
            f"--port={ENGINE_PORT}",
            # On SIGTERM vLLM would drop what it is answering.
            f"--shutdown-timeout={GRACE_SECONDS - 2 * DRAIN_SECONDS}",
            *arguments,
            *(["--trust-remote-code"] if base.remote_code else []),
            *([f"--tensor-parallel-size={resources.gpus}"] if resources.gpus > 1 else []),
            *([f"--max-model-len={asked.max_model_length}"] if asked.max_model_length else []),
            *([f"--quantization={asked.quantization}"] if asked.quantization else []),
            *settings.engine.extra_args,
            *asked.extra_args,
        ],
        "env": [
            # The image's home belongs to root; everything that is written goes to a volume.
            {"name": "HOME", "value": "/cache"},
            {"name": "XDG_CACHE_HOME", "value": "/cache"},
            {"name": "VLLM_CACHE_ROOT", "value": "/cache/vllm"},
            {"name": "HF_HOME", "value": "/cache/huggingface"},
            {"name": "TRITON_CACHE_DIR", "value": "/cache/triton"},
            {"name": "TORCHINDUCTOR_CACHE_DIR", "value": "/cache/torchinductor"},
            {"name": "USER", "value": "finetune"},  # torch asks for the name of a user that the image does not know
            {"name": "HF_HUB_OFFLINE", "value": "1"},
            {"name": "VLLM_NO_USAGE_STATS", "value": "1"},
            {"name": "VLLM_DO_NOT_TRACK", "value": "1"},
            *environment,
            *({"name": name, "value": value} for name, value in sorted(settings.engine.env.items())),
        ],
        "ports": [{"name": "http", "containerPort": ENGINE_PORT, "protocol": "TCP"}],
        "startupProbe": _probe("/health", "http", STARTUP_SECONDS),
        "livenessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10, "timeoutSeconds": 10},
        "readinessProbe": {
            "httpGet": {"path": ready_path, "port": "http"},
            "periodSeconds": PERIOD_SECONDS,
            "timeoutSeconds": 5,
        },
        "lifecycle": {"preStop": {"sleep": {"seconds": DRAIN_SECONDS}}},
        "resources": _resources(parent),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": _restricted(),
        "volumeMounts": [_mount("cache", "/cache"), _mount("tmp", "/tmp"), _mount("shm", "/dev/shm"), *mounts],
    }


def _agent(
    parent: AdapterDeployment, limits: Limits, storage: Storage, secret: str, base: Base, settings: Settings
) -> Object:
    """A native sidecar: it prepares before the engine starts and stays beside it."""
    meta = parent.metadata
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{meta.namespace}/adapterdeployments/{meta.name}/report"
    return {
        "name": AGENT,
        "image": settings.images.agent,
        "imagePullPolicy": settings.images.pull_policy,
        "command": ["python3", "-m", "finetune_serving.agent"],
        "restartPolicy": "Always",
        "env": [
            {"name": "HOME", "value": "/tmp"},
            {"name": "FINETUNE_STORAGE_URI", "value": storage.uri},
            {"name": "FINETUNE_STORAGE_ENDPOINT", "value": storage.endpoint},
            {"name": "FINETUNE_STORAGE_REGION", "value": storage.region},
            {"name": "FINETUNE_REPORT_URL", "value": settings.reports.url + path},
            {"name": "FINETUNE_MIN_LORA_RANK", "value": str(limits.rank)},
            {"name": "FINETUNE_MAX_LOADED", "value": str(limits.adapters)},
            # On a CPU, vLLM answers for the base model with what is in the last slot: that one stays free (slots.py).
            {"name": "FINETUNE_MAX_LORAS", "value": str(limits.adapters + (0 if parent.spec.resources.gpus else 1))},
            # Another base model is another pod; an adapter is not.
            {"name": "FINETUNE_BASE_MODEL", "value": f"{base.uri} {base.digest}".strip()},
            *_credentials(secret),
        ],
        "ports": [{"name": "agent", "containerPort": HEALTH_PORT, "protocol": "TCP"}],
        "startupProbe": _probe("/healthz", "agent", STARTUP_SECONDS),
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": _restricted(),
        "volumeMounts": [
            _mount("state", STATE),
            _mount("models", MODELS),
            _mount("tmp", "/tmp"),
            _mount("desired", "/etc/finetune", read_only=True),
            _mount("report-token", "/var/run/finetune", read_only=True),
            *_base_mounts(base),
        ],
    }


def _merge(parent: AdapterDeployment, base: Base, secret: str, settings: Settings) -> Object:
    """The trainer image merges on the CPU; its termination message is the result."""
    resources = parent.spec.resources
    memory = {"limits": {"memory": resources.memory}} if resources.memory else {}
    return {
        "name": MERGE,
        "image": settings.images.trainer,
        "imagePullPolicy": settings.images.pull_policy,
        "args": ["merge", "--spec", "/etc/finetune/merge.json", "--output", MERGED],
        "env": [{"name": "HOME", "value": "/cache"}, *_credentials(secret)],
        "resources": {"requests": {"cpu": resources.cpu, "memory": resources.memory or "2Gi"}, **memory},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": _restricted(),
        "volumeMounts": [
            _mount("models", MODELS),
            _mount("cache", "/cache"),
            _mount("tmp", "/tmp"),
            _mount("merge-spec", "/etc/finetune", read_only=True),
            *_base_mounts(base),
        ],
    }


def _metadata(parent: AdapterDeployment, name: str) -> Object:
    owner = {
        "apiVersion": parent.api_version,
        "kind": parent.kind,
        "metadata": {"name": parent.metadata.name, "uid": parent.metadata.uid},
    }
    return {
        "name": name,
        "namespace": parent.metadata.namespace,
        "labels": selector(parent),
        "ownerReferences": [labels.owner_reference(owner)],
    }


def _resources(parent: AdapterDeployment) -> Object:
    asked = parent.spec.resources
    requests: Object = {"cpu": asked.cpu, "memory": asked.memory or "2Gi"}
    limits: Object = {"memory": asked.memory} if asked.memory else {}
    if asked.gpus:
        requests[asked.gpu_resource] = limits[asked.gpu_resource] = str(asked.gpus)
    return {"requests": requests, "limits": limits} if limits else {"requests": requests}


def _credentials(secret: str) -> list[Object]:
    def of(key: str, **optional: bool) -> Object:
        return {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, **optional}}}

    return [of("AWS_ACCESS_KEY_ID"), of("AWS_SECRET_ACCESS_KEY"), of("AWS_SESSION_TOKEN", optional=True)]


def _restricted() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _probe(path: str, port: str, seconds: int) -> Object:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": PERIOD_SECONDS,
        "timeoutSeconds": 5,
        "failureThreshold": seconds // PERIOD_SECONDS,
    }


def _report_token(settings: Settings) -> Object:
    sources: list[Object] = [
        {"serviceAccountToken": {"audience": labels.REPORT_AUDIENCE, "expirationSeconds": 3600, "path": "token"}}
    ]
    if settings.reports.ca_config_map:
        items = [{"key": "ca.crt", "path": "ca.crt"}]
        sources.append({"configMap": {"name": settings.reports.ca_config_map, "items": items}})
    return {"name": "report-token", "projected": {"sources": sources}}


def _empty(name: str) -> Object:
    return {"name": name, "emptyDir": {}}


def _mount(name: str, path: str, *, read_only: bool = False) -> Object:
    return {"name": name, "mountPath": path, "readOnly": True} if read_only else {"name": name, "mountPath": path}


def _base_volumes(base: Base) -> list[Object]:
    claim = {"claimName": base.claim, "readOnly": True}
    return [{"name": "base-model", "persistentVolumeClaim": claim}] if base.claim else []


def _base_mounts(base: Base) -> list[Object]:
    return [_mount("base-model", "/data/base-model", read_only=True)] if base.claim else []
