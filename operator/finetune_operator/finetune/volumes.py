"""The volumes of a run's pods: each as a pair of (volume, mount), the paths being part of the contract with the trainer."""

from __future__ import annotations

from typing import Any

from finetune_operator import labels
from finetune_operator.api.common import PersistentVolumeClaimSource
from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.settings import Settings
from finetune_trainer.runspec import Stage

Object = dict[str, Any]
Mounted = tuple[Object, Object]

SPEC_FILE = "/etc/finetune/spec.json"
WORK = "/work"
REPORT = "/var/run/finetune"
TOKEN_SECONDS = 3600


def of(spec: FineTuneSpec, stage: Stage, settings: Settings) -> list[Mounted]:
    """Everything that a pod of this stage mounts; the root file system is read-only."""
    mounted = [_run_spec(), _report_token(settings), _empty("work", WORK), _empty("tmp", "/tmp")]
    if stage == "train" and spec.resources.shared_memory:
        mounted.append(_empty("shm", "/dev/shm", medium="Memory", sizeLimit=spec.resources.shared_memory))
    if spec.base_model.persistent_volume_claim:
        mounted.append(_claim("base-model", spec.base_model.persistent_volume_claim))
    if stage == "prepare":
        mounted += _data("train", spec.dataset.train)
        mounted += _data("evaluation", spec.dataset.evaluation)
    return mounted


def of_cleanup() -> list[Mounted]:
    """The clean-up reads its spec and needs nothing else."""
    return [_run_spec(), _empty("work", WORK), _empty("tmp", "/tmp")]


def _run_spec() -> Mounted:
    field = {"path": "spec.json", "fieldRef": {"fieldPath": f"metadata.annotations['{labels.RUN_SPEC}']"}}
    return (
        {"name": "run-spec", "downwardAPI": {"items": [field]}},
        {"name": "run-spec", "mountPath": "/etc/finetune", "readOnly": True},
    )


def _report_token(settings: Settings) -> Mounted:
    """The token that lets this pod, and no other, report on its own run; and the CA of the server that it goes to."""
    sources: list[Object] = [
        {
            "serviceAccountToken": {
                "audience": labels.REPORT_AUDIENCE,
                "expirationSeconds": TOKEN_SECONDS,
                "path": "token",
            }
        }
    ]
    if settings.reports.ca_config_map:
        certificate = {"key": "ca.crt", "path": "ca.crt"}
        sources.append({"configMap": {"name": settings.reports.ca_config_map, "items": [certificate]}})
    return (
        {"name": "report-token", "projected": {"sources": sources}},
        {"name": "report-token", "mountPath": REPORT, "readOnly": True},
    )


def _empty(name: str, path: str, **options: str) -> Mounted:
    return {"name": name, "emptyDir": dict(options)}, {"name": name, "mountPath": path}


def _data(role: str, source: Any) -> list[Mounted]:
    if source is None:
        return []
    if source.persistent_volume_claim:
        return [_claim(role, source.persistent_volume_claim)]
    if source.config_map:
        file = {"key": source.config_map.key, "path": source.config_map.key}
        return [
            (
                {"name": role, "configMap": {"name": source.config_map.name, "items": [file]}},
                {"name": role, "mountPath": f"/data/{role}", "readOnly": True},
            )
        ]
    return []


def _claim(role: str, source: PersistentVolumeClaimSource) -> Mounted:
    return (
        {"name": role, "persistentVolumeClaim": {"claimName": source.claim_name, "readOnly": True}},
        {"name": role, "mountPath": f"/data/{role}", "readOnly": True},
    )
