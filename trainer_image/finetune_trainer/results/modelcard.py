"""README.md of an adapter or a merged model: the metadata that a hub reads, what it was made from, how good it is, how to load it."""

import json
import math
from typing import Any

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.finetunestatus import EvaluationStatus
from finetune_trainer.runspec import RunSpec

CARD = "README.md"


def base_name(spec: FineTuneSpec) -> str:
    """The base model's name that means the same everywhere: hub repository, s3:// address, or claim and path."""
    source = spec.base_model
    if source.hugging_face:
        return source.hugging_face.repo
    if source.s3:
        return source.s3.uri
    assert source.persistent_volume_claim
    return f"pvc://{source.persistent_volume_claim.claim_name}/{source.persistent_volume_claim.path}"


def model_card(
    run: RunSpec,
    config: dict[str, Any],
    trained_parameters: int,
    evaluation: EvaluationStatus,
    license: str | None = None,
) -> str:
    """The card of an adapter. It holds no date and no path, so that the same adapter has the same digest."""
    base = str(config["base_model_name_or_path"])
    kind, options = loaded_with(run.spec)
    return _card(
        run,
        [*_metadata(run, "peft", "adapter"), *([f"license: {json.dumps(license)}"] if license else [])],
        f"An adapter for {base}, trained and evaluated by finetune-operator.",
        [*_facts(run), ("Trained parameters", f"{trained_parameters:,}")],
        evaluation,
        [
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f"model = {kind}.from_pretrained({json.dumps(base)}{options})",
            f'model = PeftModel.from_pretrained(model, "{run.name}")  # the folder with this file',
        ],
    )


def loaded_with(spec: FineTuneSpec) -> tuple[str, str]:
    """The class of transformers that loads the base model of an adapter, and its further arguments."""
    if spec.objective.type == "Reward":
        return "AutoModelForSequenceClassification", ", num_labels=1"
    return "AutoModelForCausalLM", ""


def merged_card(run: RunSpec, dtype: str, license: str | None = None) -> str:
    """The card of base model and adapter as one model."""
    assert run.trained
    kind, _ = loaded_with(run.spec)
    return _card(
        run,
        [*_metadata(run, "transformers", "finetune"), *([f"license: {json.dumps(license)}"] if license else [])],
        f"{base_name(run.spec)} with an adapter merged into its weights, trained and evaluated by finetune-operator.",
        [*_facts(run), ("Adapter digest", run.trained.adapter.digest), ("Weights", dtype)],
        run.trained.evaluation or EvaluationStatus(),
        [
            f"from transformers import {kind}",
            "",
            f'model = {kind}.from_pretrained("{run.name}")  # the folder with this file',
        ],
    )


def gguf_card(run: RunSpec, file: str, dtype: str, license: str | None = None) -> str:
    """The card of the merged model as one file."""
    assert run.trained
    return _card(
        run,
        [*_metadata(run, "gguf", "quantized"), *([f"license: {json.dumps(license)}"] if license else [])],
        f"{base_name(run.spec)} with an adapter merged into its weights as one GGUF file, trained and evaluated by "
        "finetune-operator.",
        [*_facts(run), ("Adapter digest", run.trained.adapter.digest), ("Weights", dtype)],
        run.trained.evaluation or EvaluationStatus(),
        [f"llama-server --model {file}", f"llama-quantize {file} {run.name}-Q4_K_M.gguf Q4_K_M  # smaller"],
        language="sh",
    )


def _card(
    run: RunSpec,
    metadata: list[str],
    summary: str,
    facts: list[tuple[str, str]],
    evaluation: EvaluationStatus,
    use: list[str],
    language: str = "python",
) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts if value]
    lines = [
        "---",
        *metadata,
        *_model_index(run, evaluation),
        "---",
        "",
        f"# {run.name}",
        "",
        summary,
        "",
        "| | |",
        "|---|---|",
        *rows,
    ]
    return "\n".join([*lines, *_evaluation(evaluation), "", "## Use", "", f"```{language}", *use, "```", ""])


def _facts(run: RunSpec) -> list[tuple[str, str]]:
    spec, prepared = run.spec, run.prepared
    assert prepared
    method, training = spec.method, spec.training
    length = f"{training.epochs:g} epochs" if training.max_steps is None else f"{training.max_steps} steps"
    if training.early_stopping:
        length = f"at most {length}, the best of them by evaluation loss"
    return [
        ("Base model", " at ".join(filter(None, (base_name(spec), prepared.base_model.revision)))),
        ("Base digest", prepared.base_model.digest),
        ("Dataset digest", prepared.dataset.digest),
        ("Samples", f"{prepared.dataset.samples:,} ({prepared.dataset.tokens:,} tokens, {prepared.dataset.format})"),
        ("Objective", spec.objective.type),
        ("Method", method.type + (f", {method.quantization.type} base" if method.quantization.type != "None" else "")),
        (
            "Training",
            f"{length}, batch {training.batch_size}, {training.optimizer}, learning rate {training.learning_rate:g}",
        ),
        ("Run", prepared.run_id),
    ]


def _metadata(run: RunSpec, library: str, relation: str) -> list[str]:
    spec = run.spec
    hub, data = spec.base_model.hugging_face, spec.dataset.train.hugging_face
    # Hubs refuse a base_model or a dataset that is not a repository.
    return [
        *([f"base_model: {json.dumps(hub.repo)}", f"base_model_relation: {relation}"] if hub else []),
        *(["datasets:", f"- {json.dumps(data.repo)}"] if data else []),
        f"library_name: {library}",
        f"pipeline_tag: {_task(run)}",
        "tags:",
        *(f"- {tag}" for tag in ("finetune-operator", spec.method.type.lower(), spec.objective.type.lower())),
    ]


def _model_index(run: RunSpec, evaluation: EvaluationStatus) -> list[str]:
    """The adapter's measurements in the form that hubs show and search, one result per data set."""
    measured = {name: value for name, value in evaluation.adapter.items() if math.isfinite(value)}
    if not measured:
        return []
    results: dict[str, list[tuple[str, float]]] = {}
    for name, value in measured.items():
        task, _, metric = name.rpartition("/")
        results.setdefault(task, []).append((metric, value))
    lines = ["model-index:", f"- name: {json.dumps(run.name)}", "  results:"]
    for task, metrics in results.items():
        data = {"name": task or "held-out rows", "type": task or _data_type(run)}
        lines += [
            f"  - task: {{type: {_task(run)}}}",
            f"    dataset: {json.dumps(data)}",
            "    metrics:",
            *(f"    - {json.dumps({'type': metric, 'value': round(value, 6)})}" for metric, value in metrics),
        ]
    return lines


def _data_type(run: RunSpec) -> str:
    """The hub's name of the data set that rows were held out from, where it has one."""
    data = run.spec.dataset
    given = data.evaluation.hugging_face if data.evaluation else None
    source = given or (data.train.hugging_face if data.evaluation and data.evaluation.fraction else None)
    return source.repo if source else "private"


def _task(run: RunSpec) -> str:
    return "text-classification" if run.spec.objective.type == "Reward" else "text-generation"


def _evaluation(evaluation: EvaluationStatus) -> list[str]:
    held_out = [name for name in evaluation.adapter if "/" not in name]
    tasks = [name for name in evaluation.adapter if "/" in name]
    return [
        *_table("Evaluation on held-out rows", held_out, evaluation),
        *_table("Tasks of the lm-evaluation-harness", tasks, evaluation),
    ]


def _table(title: str, metrics: list[str], evaluation: EvaluationStatus) -> list[str]:
    if not metrics:
        return []
    lines = ["", f"## {title}", "", "| metric | base | adapter |", "|---|---|---|"]
    for metric in metrics:
        base = evaluation.base.get(metric)
        lines.append(f"| {metric} | {'-' if base is None else f'{base:.4f}'} | {evaluation.adapter[metric]:.4f} |")
    return lines
