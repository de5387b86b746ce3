"""The contract between operator and trainer: the run spec that a Job is given and the Result that it leaves.

pydantic and the standard library only, so that it imports in milliseconds. The parts of a Result are the API's status
types: the operator copies them into status as they are.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, Self

from pydantic import Field

from finetune_operator.api.common import Spec, Status
from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.finetunestatus import (
    AdapterStatus,
    BaseModelStatus,
    DatasetStatus,
    EstimateStatus,
    EvaluationStatus,
    ExportStatus,
    TrackerStatus,
)
from finetune_operator.api.tracking import Tracking
from finetune_trainer.digest import canonical_json, without_nan

Stage = Literal["prepare", "train", "export"]
RENDEZVOUS_PORT = 29500  # of the first pod: where the processes of several nodes meet
MAX_RESULT_BYTES = 4096  # what the kubelet keeps of a termination message


class Storage(Spec):
    """The S3 server that holds artifacts, and the place in it; credentials are in the environment."""

    uri: str  # s3://bucket/prefix
    endpoint: str = ""  # http(s)://host:port; empty: AWS
    region: str = ""


class Reused(Status):
    """An adapter that the bucket holds already for the same run id, verified."""

    adapter: AdapterStatus
    evaluation: EvaluationStatus | None = None
    report: str = ""


class PrepareResult(Status):
    """What prepare found and made."""

    run_id: str
    base_model: BaseModelStatus
    dataset: DatasetStatus
    estimate: EstimateStatus | None = None
    total_steps: int = 0
    reused: Reused | None = None


class TrainResult(Status):
    """What training made."""

    adapter: AdapterStatus
    evaluation: EvaluationStatus | None = None
    steps: int = 0
    final_loss: float | None = None
    resumed_from_step: int | None = None
    seconds_to_first_step: float | None = None
    micro_batch: int | None = None
    report: str = ""  # address of report.html
    tracking: list[TrackerStatus] = Field(default_factory=list)


class ExportResult(Status):
    """What export made, one entry per export."""

    exports: list[ExportStatus] = Field(default_factory=list)


class Failure(Status):
    """Why a stage failed: a reason of finetune_trainer.failures and a message with the fix."""

    reason: str
    message: str = ""


class RunSpec(Spec):
    """One attempt at one stage of a run, as the operator writes it into the Job's pod annotation."""

    stage: Stage
    namespace: str
    name: str
    uid: str = ""
    job: str
    attempt: int = 1
    inputs: str = ""
    spec: FineTuneSpec
    storage: Storage
    trainer_image: str = ""
    report_url: str | None = None
    pretend_gpu: bool = False
    tracking: Tracking | None = None  # of the spec or of the chart
    prepared: PrepareResult | None = None
    trained: TrainResult | None = None
    micro_batch: int | None = None


class Result(Status):
    """What a stage leaves: exactly one of prepared, trained, exported and failure."""

    stage: str
    job: str
    run_id: str | None = None
    prepared: PrepareResult | None = None
    trained: TrainResult | None = None
    exported: ExportResult | None = None
    failure: Failure | None = None

    @classmethod
    def failed(cls, spec: RunSpec, reason: str, message: str) -> Self:
        run_id = spec.prepared.run_id if spec.prepared else None
        return cls(stage=spec.stage, job=spec.job, run_id=run_id, failure=Failure(reason=reason, message=message))

    def wire(self) -> bytes:
        """JSON of at most 4096 bytes: messages are cut when they must be, then metrics left out that no gate asks for
        (result.json in the bucket has them); the structure stays. A figure that is no number is left out.
        """
        data = without_nan(self.model_dump(mode="json", by_alias=True, exclude_none=True))
        for length in (None, 2000, 1000, 500, 200, 80, 0):
            encoded = canonical_json(_cut(data, length))
            if len(encoded) <= MAX_RESULT_BYTES:
                return encoded
        encoded = canonical_json(_cut(_gated_metrics(data), 0))
        if len(encoded) > MAX_RESULT_BYTES:
            raise ValueError(f"a Result of {len(encoded)} bytes cannot be cut to {MAX_RESULT_BYTES}")
        return encoded


def inputs_hash(spec: FineTuneSpec, trainer_image: str) -> str:
    """16 hex digits that change exactly when an edit asks for another run."""
    asked = _trained(spec)
    asked["baseModel"] = _json(spec.base_model)
    asked["dataset"] = _json(spec.dataset)
    asked["evaluation"] = _json(spec.evaluation)
    return _hash(asked, trainer_image)


def run_id(base_digest: str, dataset_digest: str, spec: FineTuneSpec, trainer_image: str) -> str:
    """16 hex digits that name what is trained: the same id is the same training, whatever object asked for it."""
    return _hash({**_trained(spec), "baseModel": base_digest, "dataset": dataset_digest}, trainer_image)


def _trained(spec: FineTuneSpec) -> dict[str, object]:
    # microBatchSize and gradientCheckpointing trade memory for time: the effective batch and so the run stay the same
    training = _json(spec.training)
    for name in ("microBatchSize", "gradientCheckpointing"):
        training.pop(name, None)
    return {"objective": _json(spec.objective), "method": _json(spec.method), "training": training}


def _json(model: Spec) -> dict[str, object]:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


def _hash(asked: dict[str, object], trainer_image: str) -> str:
    return hashlib.sha256(canonical_json({**asked, "trainerImage": trainer_image})).hexdigest()[:16]


def _gated_metrics(value: Any) -> Any:
    """The value with only those metrics in an evaluation that its gates are about."""
    if not isinstance(value, dict):
        return value
    if "gates" in value:
        gated = {gate["metric"] for gate in value["gates"]}
        kept = {key: {name: value[key][name] for name in value[key] if name in gated} for key in ("base", "adapter")}
        return value | kept | {"lowerIsBetter": [name for name in value.get("lowerIsBetter", []) if name in gated]}
    return {key: _gated_metrics(item) for key, item in value.items()}


def _cut(value: object, length: int | None) -> object:
    """The value with every message cut to `length` characters."""
    if length is None:
        return value
    if isinstance(value, dict):
        return {key: _shorten(item, length) if key == "message" else _cut(item, length) for key, item in value.items()}
    return [_cut(item, length) for item in value] if isinstance(value, list) else value


def _shorten(text: object, length: int) -> str:
    words = str(text)
    return words if len(words) <= length else words[: max(length - 1, 0)] + "…"
