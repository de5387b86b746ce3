"""README.md of an adapter: the metadata that a hub reads, what it was made from, how good it is, how to load it."""

import json
from typing import Any

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.finetunestatus import EvaluationStatus
from finetune_trainer.runspec import RunSpec


def base_name(spec: FineTuneSpec) -> str:
    """The base model's name that means the same everywhere: hub repository, s3:// address, or claim and path."""
    source = spec.base_model
    if source.hugging_face:
        return source.hugging_face.repo
    if source.s3:
        return source.s3.uri
    assert source.persistent_volume_claim
    return f"pvc://{source.persistent_volume_claim.claim_name}/{source.persistent_volume_claim.path}"


def model_card(run: RunSpec, config: dict[str, Any], trained_parameters: int, evaluation: EvaluationStatus) -> str:
    """The card as text. It holds no date and no path, so that the same adapter has the same digest."""
    spec, prepared = run.spec, run.prepared
    assert prepared
    base, method, training = str(config["base_model_name_or_path"]), spec.method, spec.training
    length = f"{training.epochs:g} epochs" if training.max_steps is None else f"{training.max_steps} steps"
    facts = [
        ("Base model", f"{base} at {prepared.base_model.revision}"),
        ("Base digest", prepared.base_model.digest),
        ("Dataset digest", prepared.dataset.digest),
        ("Samples", f"{prepared.dataset.samples:,} ({prepared.dataset.tokens:,} tokens, {prepared.dataset.format})"),
        ("Objective", spec.objective.type),
        ("Method", method.type + (f", {method.quantization.type} base" if method.quantization.type != "None" else "")),
        ("Trained parameters", f"{trained_parameters:,}"),
        (
            "Training",
            f"{length}, batch {training.batch_size}, {training.optimizer}, learning rate {training.learning_rate:g}",
        ),
        ("Run", prepared.run_id),
    ]
    rows = [f"| {name} | {value} |" for name, value in facts if value]
    return "\n".join(
        [
            "---",
            *_metadata(base, run),
            "---",
            "",
            f"# {run.name}",
            "",
            f"An adapter for {base}, trained and evaluated by finetune-operator.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            *_evaluation(evaluation),
            "",
            "## Use",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
            f'model = PeftModel.from_pretrained(model, "{run.name}")  # the folder with this file',
            "```",
            "",
        ]
    )


def _metadata(base: str, run: RunSpec) -> list[str]:
    hub = run.spec.base_model.hugging_face is not None  # a hub refuses a base_model that is not a repository
    tags = ["finetune-operator", run.spec.method.type.lower(), run.spec.objective.type.lower()]
    return [
        *([f"base_model: {base}", "base_model_relation: adapter"] if hub else []),
        "library_name: peft",
        f"pipeline_tag: {'text-classification' if run.spec.objective.type == 'Reward' else 'text-generation'}",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]


def _evaluation(evaluation: EvaluationStatus) -> list[str]:
    if not evaluation.adapter:
        return []
    lines = ["", "## Evaluation on held-out rows", "", "| metric | base | adapter |", "|---|---|---|"]
    for metric, value in evaluation.adapter.items():
        base = evaluation.base.get(metric)
        lines.append(f"| {metric} | {'-' if base is None else f'{base:.4f}'} | {value:.4f} |")
    return lines
