"""Builds the Jobs of a run as plain dicts: one Job is one attempt, created once and never changed.

A run on several nodes is one indexed Job: a pod per node, and a Service by whose name they find the first of them.
"""

from __future__ import annotations

import json
import math
from typing import Any

from finetune_operator import labels, podtemplate, restricted
from finetune_operator.api.finetune import FineTune, FineTuneSpec
from finetune_operator.api.tracking import Tracking
from finetune_operator.finetune import volumes
from finetune_operator.settings import Settings
from finetune_trainer.runspec import RENDEZVOUS_PORT, RunSpec, Stage, Storage

Object = dict[str, Any]

CONTAINER = "trainer"
MLFLOW_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
# Time between SIGTERM and SIGKILL: a training pod uploads a checkpoint in it.
GRACE_SECONDS: dict[Stage, int] = {"prepare": 30, "train": 120, "export": 30}


def job_name(parent: str, stage: Stage, identity: str, attempt: int) -> str:
    """`<name>-prepare-<inputs>[-n]`, `<name>-train-<run id>-<n>` or `<name>-export-<run id>-<n>`; at most 63 characters,
    as names of pods must be.
    """
    short = identity[:8]
    number = f"-{attempt}" if stage != "prepare" or attempt > 1 else ""
    return f"{parent}-{stage}-{short}{number}"


def run_spec(parent: FineTune, stage: Stage, name: str, settings: Settings, **of_the_run: Any) -> RunSpec:
    """What the Job's pod is told; `of_the_run` are attempt, inputs, trainer_image, prepared, trained, micro_batch."""
    meta = parent.metadata
    return RunSpec(
        stage=stage,
        namespace=meta.namespace,
        name=meta.name,
        uid=meta.uid,
        job=name,
        spec=parent.spec,
        storage=storage_of(parent.spec, settings),
        report_url=(
            f"{settings.reports.url}/apis/finetune.dev/v1alpha1/namespaces/{meta.namespace}/finetunes/{meta.name}/report"
        ),
        pretend_gpu=settings.pretend_gpus,
        tracking=_tracking(parent.spec, settings) if stage == "train" else None,
        **of_the_run,
    )


def job(parent: FineTune, spec: RunSpec, settings: Settings) -> Object:
    """The whole Job of one attempt at `spec.stage`."""
    meta = parent.metadata
    identity = {
        **labels.of_owner("FineTune", meta.name),
        labels.STAGE: spec.stage,
        labels.INPUTS: spec.inputs,
        labels.ATTEMPT: str(spec.attempt),
    }
    nodes = _nodes(parent.spec, spec.stage)
    queue = {labels.KUEUE_QUEUE: parent.spec.queue_name} if parent.spec.queue_name else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": spec.job,
            "namespace": meta.namespace,
            "labels": {**identity, **queue},
            "ownerReferences": [
                labels.owner_reference(
                    {
                        "apiVersion": parent.api_version,
                        "kind": parent.kind,
                        "metadata": {"name": meta.name, "uid": meta.uid},
                    }
                )
            ],
        },
        "spec": {
            "completions": nodes,
            "parallelism": nodes,
            **({"completionMode": "Indexed"} if nodes > 1 else {}),
            # One failed pod fails the attempt. Retries are the operator's: each is an attempt of its own, with a reason and a price in the status.
            "backoffLimit": 0,
            "podFailurePolicy": _pod_failure_policy(),
            # Never two pods of one run at once: they would write the same checkpoints.
            "podReplacementPolicy": "Failed",
            "template": podtemplate.merge(parent.spec.pod_template, _pod(parent, spec, settings, identity), CONTAINER),
        },
    }


def rendezvous(job: Object) -> Object | None:
    """The headless Service that gives the pods of a Job (as stored) their names; None when there is one pod only."""
    meta = job["metadata"]
    name = job["spec"]["template"]["spec"].get("subdomain")
    if name is None:
        return None
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": meta["labels"],
            # Goes with its Job.
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
            ],
        },
        "spec": {
            "clusterIP": "None",
            "selector": {labels.JOB_NAME: meta["name"]},
            # They look for each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT, "targetPort": RENDEZVOUS_PORT}],
        },
    }


def _service_name(job: str) -> str:
    """A letter first, as names of Services must have; at most 63 characters."""
    return f"ft-{job}"


def _nodes(spec: FineTuneSpec, stage: Stage) -> int:
    return spec.resources.nodes if stage == "train" else 1


def _pod_failure_policy() -> Object:
    """Pods that were interrupted are replaced by the Job controller at once, even while the operator is down."""
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [143]}},
        ]
    }


def _pod(parent: FineTune, spec: RunSpec, settings: Settings, identity: dict[str, str]) -> Object:
    mounted = volumes.of(parent.spec, spec.stage, settings)
    several = _nodes(parent.spec, spec.stage) > 1
    return {
        "metadata": {
            "labels": identity,
            "annotations": {
                labels.RUN_SPEC: json.dumps(
                    spec.model_dump(mode="json", by_alias=True, exclude_none=True),
                    sort_keys=True,
                    separators=(",", ":"),
                )
            },
        },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_SECONDS[spec.stage],
            **({"subdomain": _service_name(spec.job)} if several else {}),
            "imagePullSecrets": [{"name": name} for name in settings.images.pull_secrets],
            **restricted.pod(),
            "containers": [
                {
                    "name": CONTAINER,
                    "image": spec.trainer_image,
                    "imagePullPolicy": settings.images.pull_policy,
                    "args": [spec.stage, "--spec", volumes.SPEC_FILE],
                    "env": _environment(spec, settings) + ([_first_pod(spec.job)] if several else []),
                    "resources": _resources(spec, settings),
                    # The last lines of the log say what killed a process that left no result.
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "securityContext": restricted.container(),
                    "volumeMounts": [mount for _, mount in mounted],
                }
            ],
            "volumes": [volume for volume, _ in mounted],
        },
    }


def _environment(run: RunSpec, settings: Settings) -> list[Object]:
    spec, stage = run.spec, run.stage
    environment = storage_environment(spec, settings)
    if stage == "prepare":
        environment += _hub(spec, settings)
    if stage == "export" and spec.output.hub:
        token = spec.output.hub.token_secret_ref
        environment += [*_hub_endpoint(settings), _secret("FINETUNE_OUTPUT_HF_TOKEN", token.name, token.key)]
    return environment + (_tracking_credentials(run.tracking) if run.tracking else [])


def storage_environment(spec: FineTuneSpec, settings: Settings) -> list[Object]:
    """The credentials of the bucket, and a home that can be written to."""
    reference = spec.output.s3.credentials_secret_ref
    storage = reference.name if reference else settings.storage.credentials_secret
    return [
        {"name": "HOME", "value": f"{volumes.WORK}/home"},
        _secret("AWS_ACCESS_KEY_ID", storage, "AWS_ACCESS_KEY_ID"),
        _secret("AWS_SECRET_ACCESS_KEY", storage, "AWS_SECRET_ACCESS_KEY"),
        _secret("AWS_SESSION_TOKEN", storage, "AWS_SESSION_TOKEN", optional=True),
    ]


def storage_of(spec: FineTuneSpec, settings: Settings) -> Storage:
    """Where the FineTune's artifacts go."""
    chart = settings.storage
    return Storage(uri=spec.output.s3.uri or chart.uri, endpoint=chart.endpoint, region=chart.region)


def _tracking(spec: FineTuneSpec, settings: Settings) -> Tracking | None:
    """The spec's, or the chart's when the spec has none; an empty one is none."""
    asked = spec.tracking if spec.tracking is not None else settings.tracking
    return asked if asked.mlflow or asked.wandb else None


def _tracking_credentials(tracking: Tracking) -> list[Object]:
    """In the variables that MLflow and W&B define; optional, because a run must not wait for a tracker's Secret."""
    found: list[Object] = []
    if tracking.mlflow and tracking.mlflow.credentials_secret_ref:
        secret = tracking.mlflow.credentials_secret_ref.name
        found += [_secret(name, secret, name, optional=True) for name in MLFLOW_CREDENTIALS]
    if tracking.wandb:
        key = tracking.wandb.api_key_secret_ref
        found.append(_secret("WANDB_API_KEY", key.name, key.key, optional=True))
    return found


def _first_pod(job: str) -> Object:
    """Where the pods meet; which of them a pod is, the Job controller tells it (JOB_COMPLETION_INDEX)."""
    return {"name": "MASTER_ADDR", "value": f"{job}-0.{_service_name(job)}"}


def _hub_endpoint(settings: Settings) -> list[Object]:
    endpoint = settings.hugging_face.endpoint
    return [{"name": "HF_ENDPOINT", "value": endpoint}] if endpoint else []


def _hub(spec: FineTuneSpec, settings: Settings) -> list[Object]:
    """The tokens that read from the hub reach the prepare Job only."""
    sources = {
        "FINETUNE_BASE_MODEL_HF_TOKEN": spec.base_model.hugging_face,
        "FINETUNE_TRAIN_HF_TOKEN": spec.dataset.train.hugging_face,
        "FINETUNE_EVALUATION_HF_TOKEN": spec.dataset.evaluation.hugging_face if spec.dataset.evaluation else None,
    }
    return _hub_endpoint(settings) + [
        _secret(name, source.token_secret_ref.name, source.token_secret_ref.key)
        for name, source in sources.items()
        if source is not None and source.token_secret_ref is not None
    ]


def _secret(name: str, secret: str, key: str, *, optional: bool = False) -> Object:
    reference: Object = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _resources(run: RunSpec, settings: Settings) -> Object:
    if run.stage == "prepare":
        return {
            "requests": {"cpu": settings.prepare.cpu, "memory": settings.prepare.memory},
            "limits": {"memory": settings.prepare.memory},
        }
    asked = run.spec.resources
    needed = _export_memory(run) if run.stage == "export" else "2Gi"
    requests: Object = {"cpu": asked.cpu, "memory": asked.memory or needed}
    limits: Object = {"memory": asked.memory} if asked.memory else {}
    if asked.gpus and run.stage == "train":
        requests[asked.gpu_resource] = limits[asked.gpu_resource] = str(asked.gpus)
    return {"requests": requests, "limits": limits} if limits else {"requests": requests}


def _export_memory(run: RunSpec) -> str:
    """What torch needs, and for a merge the weights in their type with half as much again to work with; a GGUF file is
    written tensor by tensor and mapped, not loaded.
    """
    if not run.spec.output.exports or run.prepared is None:
        return "2Gi"
    per_parameter = 6 if run.spec.output.merged_precision == "FP32" else 3
    return f"{2 + math.ceil(run.prepared.base_model.parameters * per_parameter / 2**30)}Gi"
