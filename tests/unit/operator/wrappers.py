"""Builders of the objects that operator tests talk about: small Jobs, pods, FineTunes and reports."""

import datetime as dt
import json
from typing import Any

from finetune_operator import labels, times
from finetune_operator.api.finetune import FineTune
from finetune_operator.api.finetunestatus import (
    AdapterStatus,
    BaseModelStatus,
    DatasetStatus,
    EstimateStatus,
    EvaluationStatus,
)
from finetune_operator.finetune.plan import Plan, plan
from finetune_operator.finetune.status import to_json
from finetune_operator.finetune.view import view
from finetune_operator.report import Report
from finetune_operator.settings import Settings
from finetune_trainer.runspec import Failure, PrepareResult, Result, Reused, TrainResult

Object = dict[str, Any]

NOW = dt.datetime(2026, 11, 22, 12, 0, 0, tzinfo=dt.UTC)
SETTINGS = Settings.model_validate(
    {
        "images": {"trainer": "registry.example/trainer:1", "agent": "registry.example/agent:1", "engine": "vllm:1"},
        "storage": {"uri": "s3://finetune", "endpoint": "http://minio.finetune-system:9000"},
    }
)
DIGEST = "sha256:" + "ab" * 32


def later(seconds: float) -> dt.datetime:
    return NOW + dt.timedelta(seconds=seconds)


def finetune(status: Object | None = None, generation: int = 1, **spec: Any) -> FineTune:
    """A FineTune of a model and a ConfigMap; `spec` replaces its top-level fields."""
    return FineTune.model_validate(
        {
            "metadata": {"name": "bot", "namespace": "demo", "uid": "uid-bot", "generation": generation},
            "spec": {
                "baseModel": {"s3": {"uri": "s3://models/tiny-llama"}},
                "dataset": {"train": {"configMap": {"name": "data", "key": "train.jsonl"}}},
                **spec,
            },
            "status": status or {},
        }
    )


def with_status(parent: FineTune, made: Plan, **spec: Any) -> FineTune:
    """The object as the API server would give it back after the plan's status was written."""
    fresh = finetune(to_json(made.status), **spec)
    return fresh if spec else fresh.model_copy(update={"spec": parent.spec})


def seen(
    parent: FineTune,
    jobs: list[Object] | None = None,
    pods: list[Object] | None = None,
    reports: dict[str, Report] | None = None,
    explanations: dict[str, tuple[str, str]] | None = None,
    settings: Settings = SETTINGS,
    now: dt.datetime = NOW,
) -> Plan:
    """The plan for what is seen."""
    return plan(view(parent, jobs or [], pods or [], reports or {}, explanations or {}, settings, now))


def stored(job: Object | None, uid: str = "", **status: Any) -> Object:
    """A planned Job as the API server stores it."""
    assert job is not None
    meta = {**job["metadata"], "uid": uid or f"uid-{job['metadata']['name']}", "creationTimestamp": times.rfc3339(NOW)}
    return {**job, "metadata": meta, "status": status}


def ended(job: Object, kind: str = "Failed", at: dt.datetime = NOW, reason: str = "BackoffLimitExceeded") -> Object:
    """The Job with a terminal condition."""
    condition = {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": times.rfc3339(at)}
    return {**job, "status": {**job.get("status", {}), "conditions": [condition]}}


def pod(job: Object, name: str = "", **status: Any) -> Object:
    """A pod of a Job; `status` is its status."""
    meta = job["metadata"]
    return {
        "metadata": {
            "name": name or f"{meta['name']}-x1",
            "namespace": meta["namespace"],
            "uid": f"uid-{name or meta['name'] + '-x1'}",
            "creationTimestamp": times.rfc3339(NOW),
            "labels": job["spec"]["template"]["metadata"]["labels"],
            "ownerReferences": [{"kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}],
        },
        "spec": {"nodeName": "node-1", "containers": [{"name": "trainer", "image": "registry.example/trainer:1"}]},
        "status": status,
    }


def running(job: Object, name: str = "", since: dt.datetime = NOW) -> Object:
    return pod(
        job,
        name,
        phase="Running",
        startTime=times.rfc3339(since),
        containerStatuses=[{"name": "trainer", "state": {"running": {"startedAt": times.rfc3339(since)}}}],
    )


def waiting(job: Object, reason: str, message: str = "") -> Object:
    state = {"waiting": {"reason": reason, "message": message}}
    return pod(job, phase="Pending", containerStatuses=[{"name": "trainer", "state": state}])


def terminated(
    job: Object,
    exit_code: int = 0,
    result: Result | None = None,
    reason: str = "",
    started: dt.datetime = NOW,
    finished: dt.datetime = NOW,
    message: str = "",
    **status: Any,
) -> Object:
    """A pod whose container ended, with a Result (or other text) as its termination message."""
    state = {
        "exitCode": exit_code,
        "reason": reason or ("Completed" if exit_code == 0 else "Error"),
        "finishedAt": times.rfc3339(finished),
        "message": result.wire().decode() if result else message,
    }
    return pod(
        job,
        phase="Succeeded" if exit_code == 0 else "Failed",
        startTime=times.rfc3339(started),
        containerStatuses=[{"name": "trainer", "state": {"terminated": state}}],
        **status,
    )


def prepared(job: Object, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "run_id": "0123456789abcdef",
        "base_model": BaseModelStatus(
            revision="3f9a", digest=DIGEST, uri="s3://models/tiny-llama", parameters=5_000_000
        ),
        "dataset": DatasetStatus(
            format="Messages",
            samples=100,
            tokens=4000,
            digest=DIGEST,
            uri="s3://finetune/datasets/ab",
            evaluation_samples=5,
        ),
        "estimate": EstimateStatus(verdict="Fits", largest_micro_batch=8),
        "total_steps": 40,
    }
    result = PrepareResult(**{**fields, **changes})
    return Result(stage="prepare", job=job["metadata"]["name"], run_id=result.run_id, prepared=result)


def adapter(run_id: str = "0123456789abcdef", passed: bool | None = True, digest: str = DIGEST) -> AdapterStatus:
    return AdapterStatus(
        uri=f"s3://finetune/adapters/{digest[7:]}", digest=digest, rank=16, gate_passed=passed, run_id=run_id
    )


def reused(**changes: Any) -> Reused:
    return Reused(adapter=adapter(**changes), evaluation=EvaluationStatus(adapter={"loss": 1.021}, passed=True))


def trained(job: Object, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "adapter": adapter(),
        "evaluation": EvaluationStatus(base={"loss": 3.2}, adapter={"loss": 1.021}, passed=True),
        "steps": 40,
        "final_loss": 0.913,
        "micro_batch": 8,
    }
    return Result(
        stage="train",
        job=job["metadata"]["name"],
        run_id="0123456789abcdef",
        trained=TrainResult(**{**fields, **changes}),
    )


def failed(job: Object, reason: str, message: str = "it broke") -> Result:
    meta = job["metadata"]
    return Result(stage=meta["labels"][labels.STAGE], job=meta["name"], failure=Failure(reason=reason, message=message))


def report(job: Object, at: dt.datetime = NOW, **body: Any) -> dict[str, Report]:
    """The newest report of the Job's pod."""
    meta = job["metadata"]
    name = f"{meta['name']}-x1"
    return {name: Report(name, f"uid-{name}", meta["name"], meta["uid"], {"job": meta["name"], **body}, at)}


def run_spec(job: Object | None) -> Object:
    """What a Job's pod is told."""
    assert job is not None
    spec: Object = json.loads(job["spec"]["template"]["metadata"]["annotations"][labels.RUN_SPEC])
    return spec


def condition(made: Plan, kind: str) -> tuple[str, str]:
    """Status and reason of a condition in a plan's status."""
    found = next(c for c in made.status.conditions if c.type == kind)
    return found.status, found.reason


def reasons(made: Plan) -> list[str]:
    """The reasons of a plan's Events."""
    return [event.reason for event in made.events]
