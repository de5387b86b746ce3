"""Builds ConfigMap, Deployment and Service as plain dicts; everything that a pod is told is in its template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from finetune_operator import labels, podtemplate, restricted
from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.api.common import GROUP
from finetune_operator.serving import containers
from finetune_operator.serving.containers import ENGINE, GRACE_SECONDS, MERGED, MODELS, STARTUP_SECONDS, STATE, Limits
from finetune_operator.serving.targets import Base, Target
from finetune_operator.settings import Settings
from finetune_serving.desired import Desired
from finetune_serving.routes import BASE, engine_name
from finetune_trainer.mergespec import MergeSpec
from finetune_trainer.runspec import Storage

Object = dict[str, Any]

DESIRED_KEY = "desired.json"
HASH = f"{GROUP}/hash"
MERGE_SPEC = f"{GROUP}/merge-spec"
DIGEST = f"{GROUP}/adapter-digest"

#: vLLM's processes want 160 MiB to talk through; the container runtime gives 64.
SHARED_MEMORY = "1Gi"


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
    pod["spec"]["initContainers"] = [containers.agent(parent, limits, storage, secret, base, settings)]
    pod["spec"]["containers"] = [
        containers.engine(
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
            [
                containers.mount("state", STATE),
                containers.mount("models", MODELS, read_only=True),
                *containers.base_mounts(base),
            ],
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
    pod["spec"]["initContainers"] = [containers.merge(parent, base, secret, settings)]
    pod["spec"]["containers"] = [
        containers.engine(
            parent,
            settings,
            base,
            [f"--model={MERGED}", "--served-model-name", *served],
            [],
            "/health",
            [containers.mount("models", MODELS, read_only=True)],
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
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "imagePullSecrets": [{"name": name} for name in settings.images.pull_secrets],
            **restricted.pod(),
            "volumes": volumes,
        },
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


def _base_volumes(base: Base) -> list[Object]:
    claim = {"claimName": base.claim, "readOnly": True}
    return [{"name": "base-model", "persistentVolumeClaim": claim}] if base.claim else []
