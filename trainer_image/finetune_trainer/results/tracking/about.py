"""What a tracker is told of a run beside its metrics: its name, what was trained, where the rest is, how it ended. Pure."""

from __future__ import annotations

import json
from typing import Any

from finetune_operator.api.common import Spec
from finetune_trainer.page.story import Story
from finetune_trainer.results.modelcard import base_name
from finetune_trainer.runspec import RunSpec

# Where a method that is not LoRA has its options.
OPTIONS = {
    "AdaLoRA": "ada_lora",
    "IA3": "ia3",
    "PrefixTuning": "virtual_tokens",
    "PromptTuning": "virtual_tokens",
    "PTuning": "virtual_tokens",
}
RUN_TAG = "finetune.dev/run"


def name(run: RunSpec) -> str:
    return f"{namespace(run)}/{run.name}"


def namespace(run: RunSpec) -> str:
    """A FineTune outside a cluster need not name one; kubectl would take this one."""
    return run.namespace or "default"


def run_id(run: RunSpec) -> str:
    assert run.prepared
    return run.prepared.run_id


def parameters(run: RunSpec) -> dict[str, Any]:
    """What was trained, in the words of the spec: the same for every attempt at a run."""
    assert run.prepared
    spec, prepared = run.spec, run.prepared
    method = _json(spec.method, include={"type", "quantization", OPTIONS.get(spec.method.type, "lora")})
    # Of training what, not how: that may change from attempt to attempt.
    training = _json(spec.training, exclude={"micro_batch_size", "gradient_checkpointing"})
    return {
        "baseModel": {
            "name": base_name(spec),
            "revision": prepared.base_model.revision,
            "digest": prepared.base_model.digest,
            "parameters": prepared.base_model.parameters,
        },
        "dataset": {
            "format": prepared.dataset.format,
            "samples": prepared.dataset.samples,
            "evaluationSamples": prepared.dataset.evaluation_samples,
            "tokens": prepared.dataset.tokens,
            "digest": prepared.dataset.digest,
        },
        "objective": _json(spec.objective),
        "method": method,
        "training": training,
        "trainerImage": run.trainer_image,
    }


def _json(part: Spec, **fields: set[str]) -> dict[str, Any]:
    return part.model_dump(mode="json", by_alias=True, exclude_none=True, **fields)  # type: ignore[arg-type]


def flat(parameters: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{path: text}, e.g. {"method.lora.rank": "16"}."""
    found: dict[str, str] = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value not in ("", []):
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def tags(run: RunSpec) -> dict[str, str]:
    """Of one attempt, when it begins."""
    return {
        RUN_TAG: run_id(run),
        "finetune.dev/finetune": name(run),
        "finetune.dev/status": f"kubectl -n {namespace(run)} describe finetune {run.name}",
        "finetune.dev/job": run.job,
        "finetune.dev/attempt": str(run.attempt),
        "finetune.dev/artifacts": f"{run.storage.uri.rstrip('/')}/runs/{run_id(run)}",
    }


def outcome(story: Story) -> dict[str, str]:
    """What came of the run; empty as long as nothing has."""
    found: dict[str, str] = {}
    if story.adapter:
        found |= {"finetune.dev/adapter": story.adapter.digest, "finetune.dev/adapter-uri": story.adapter.uri}
    if story.evaluation and story.evaluation.passed is not None:
        found["finetune.dev/gate-passed"] = str(story.evaluation.passed).lower()
    if story.failure:
        found["finetune.dev/failure"] = story.failure[:1000]
    return found
