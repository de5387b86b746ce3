"""Builds the containers of a serving pod as plain dicts: vLLM, the agent beside it, and the merge before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_operator import restricted
from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.serving.targets import Base
from finetune_operator.settings import Settings
from finetune_trainer.runspec import Storage

Object = dict[str, Any]

ENGINE, AGENT, MERGE = "engine", "agent", "merge"
ENGINE_PORT, HEALTH_PORT = 8000, 8001
STATE, MODELS, MERGED = "/finetune", "/models", "/models/merged"

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


def engine(
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
        "securityContext": restricted.container(),
        "volumeMounts": [mount("cache", "/cache"), mount("tmp", "/tmp"), mount("shm", "/dev/shm"), *mounts],
    }


def agent(
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
        "securityContext": restricted.container(),
        "volumeMounts": [
            mount("state", STATE),
            mount("models", MODELS),
            mount("tmp", "/tmp"),
            mount("desired", "/etc/finetune", read_only=True),
            mount("report-token", "/var/run/finetune", read_only=True),
            *base_mounts(base),
        ],
    }


def merge(parent: AdapterDeployment, base: Base, secret: str, settings: Settings) -> Object:
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
        "securityContext": restricted.container(),
        "volumeMounts": [
            mount("models", MODELS),
            mount("cache", "/cache"),
            mount("tmp", "/tmp"),
            mount("merge-spec", "/etc/finetune", read_only=True),
            *base_mounts(base),
        ],
    }


def mount(name: str, path: str, *, read_only: bool = False) -> Object:
    return {"name": name, "mountPath": path, "readOnly": True} if read_only else {"name": name, "mountPath": path}


def base_mounts(base: Base) -> list[Object]:
    return [mount("base-model", "/data/base-model", read_only=True)] if base.claim else []


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


def _probe(path: str, port: str, seconds: int) -> Object:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": PERIOD_SECONDS,
        "timeoutSeconds": 5,
        "failureThreshold": seconds // PERIOD_SECONDS,
    }
