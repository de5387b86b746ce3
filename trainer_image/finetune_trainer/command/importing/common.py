"""What axolotl and LLaMA-Factory have in common, because both hand it to the same libraries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.command.importing.settings import Settings

# transformers' curves of these names; without further arguments, its restarts are one cycle and its power is one.
SCHEDULERS = {
    "linear": "Linear",
    "cosine": "Cosine",
    "cosine_with_restarts": "Cosine",
    "polynomial": "Linear",
    "constant": "Constant",
    "constant_with_warmup": "ConstantWithWarmup",
    "inverse_sqrt": "InverseSqrt",
}
OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",  # torchao's of the same
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion_8bit": "lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
SEVERAL_GPUS = (
    "several GPUs: set resources.gpus; the effective batch was training.batchSize times the GPUs: raise it too"
)
METRICS = "metrics.jsonl, TensorBoard files and report.html are in the bucket"
ATTENTION = "the trainer chooses its attention; the result is the same"
SPEED = "a matter of speed; the result is the same"
TEMPLATE = "the base model's own chat template is used; one is chosen where it has none"
PLAIN_PROMPTS = (
    "a prompt that is text is learned as it is, without the chat template, where rows have no system column; for the "
    "template make it a list of messages"
)
RUN_NAME = "a run is named as its FineTune, and found by its inputs"
HUB_TOKEN, WANDB_KEY = {"name": "hugging-face"}, {"name": "wandb"}
_REPO = re.compile(r"^([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*$")
_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|txt|arrow)(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Words:
    """What a tool calls a setting that all have, with its default: (name, default)."""

    epochs: tuple[str, float]
    micro_batch: tuple[str, int]
    max_length: tuple[str, int]
    scheduler: tuple[str, str]
    optimizer: tuple[str, str]
    loss_on_prompts: str
    warmup_ratio: float
    batch: str = ""  # the effective batch, in place of the accumulation steps


def training(settings: Settings, words: Words) -> dict[str, Any]:
    """What of spec.training the tools have in common."""
    micro, steps = settings.count(*words.micro_batch), settings.count("gradient_accumulation_steps")
    asked = settings.count(words.batch) if words.batch else None
    batch = micro * steps if steps else asked or micro
    max_steps, epochs = settings.count("max_steps"), settings.number(*words.epochs)
    max_steps = max_steps if max_steps and max_steps > 0 else None  # transformers has -1 for none
    return {
        "epochs": None if max_steps else float(epochs),
        "maxSteps": max_steps,
        "learningRate": float(settings.number("learning_rate", 5e-5)),
        "scheduler": settings.one_of(words.scheduler[0], SCHEDULERS, words.scheduler[1]),
        "warmupRatio": warmup_ratio(settings, max_steps, words.warmup_ratio),
        "weightDecay": settings.number("weight_decay"),
        "maxGradNorm": settings.number("max_grad_norm"),
        "optimizer": settings.one_of(words.optimizer[0], OPTIMIZERS, words.optimizer[1]),
        "batchSize": batch,
        "microBatchSize": micro,
        "maxLength": settings.count(*words.max_length),
        "lossOn": "All" if settings.flag(words.loss_on_prompts) else None,
        "precision": precision(settings),
        "seed": settings.count("seed"),
    }


def switch(enabled: bool) -> str:
    return "Enabled" if enabled else "Disabled"


def base_model(settings: Settings, name: str, revision: str) -> dict[str, Any]:
    """spec.baseModel of a hub repository, an s3:// address or a local folder."""
    where, version = settings.text(name), settings.text(revision)
    trusted = settings.flag("trust_remote_code") or None
    if not where:
        raise settings.refuse(name, "it is missing; name the base model")
    if where.startswith("s3://"):
        return {"s3": {"uri": where}, "trustRemoteCode": trusted}
    if is_hub_repository(where):
        return {"huggingFace": {"repo": where, "revision": version}, "trustRemoteCode": trusted}
    uri = f"s3://models/{Path(where).name}"
    settings.warn(name, f"a local folder: upload it to {uri}, or finetune run --base-model {where}")
    return {"s3": {"uri": uri}, "trustRemoteCode": trusted}


def is_hub_repository(where: str) -> bool:
    return bool(_REPO.match(where)) and where.count("/") == 1 and not _FILE.search(where)


def to_be_uploaded(settings: Settings, name: str, names: list[str]) -> dict[str, Any]:
    """A source for files that are not in the cluster yet: a place, and a warning to upload them to it."""
    if len(names) == 1:
        uri = f"s3://datasets/{Path(names[0]).name}"
        settings.warn(name, f"upload it to {uri} or change dataset.train; here: finetune run --data {names[0]}")
        return {"s3": {"uri": uri}}
    uri = "s3://datasets/" + "-".join(Path(one).stem for one in names)[:60]
    settings.warn(name, f"{len(names)} datasets: a FineTune has one source; upload all to the folder {uri}")
    return {"s3": {"uri": uri}}


def warmup_ratio(settings: Settings, max_steps: int | None, default: float) -> float:
    """A share of the steps, whatever it was written as."""
    ratio, steps = settings.number("warmup_ratio"), settings.number("warmup_steps")
    if ratio is not None:
        return float(ratio)
    if steps == 0:
        return 0.0
    if steps and 0 < steps < 1:
        return float(steps)
    if steps and max_steps:
        return round(min(1.0, steps / max_steps), 4)
    if steps:
        settings.warn("warmup_steps", f"a FineTune has a share of the steps: training.warmupRatio: {default} is taken")
    return default


def precision(settings: Settings) -> str:
    """training.precision of the bf16 and fp16 switches."""
    bf16, fp16 = settings.first("bf16", "bfloat16", "pure_bf16"), settings.first("fp16", "float16")
    if bf16 in (True, "true", "full"):
        return "BF16"
    if fp16 in (True, "true"):
        return "FP16"
    return "FP32" if bf16 is False and fp16 is False else "Auto"


def held_out(settings: Settings, name: str) -> dict[str, Any] | None:
    """dataset.evaluation of a share of the rows."""
    share = settings.number(name)
    if not share:
        return None
    if not 0 < share <= 0.5:
        raise settings.refuse(name, "a FineTune holds out a share of the rows: write a fraction of at most 0.5")
    return {"fraction": float(share)}


def checkpoints(settings: Settings, steps: int | str | None) -> dict[str, Any]:
    """spec.checkpoint. `steps`: between checkpoints, as the tool has it."""
    by_epoch = settings.take("save_strategy") == "epoch"
    every = "epoch" if by_epoch else steps
    return {"every": every, "keep": settings.count("save_total_limit")}


def wandb(settings: Settings, name: str, project: str = "", entity: str = "") -> dict[str, Any]:
    """spec.tracking.wandb; `name`: the setting that asks for it, which the API key is said of."""
    settings.warn(name, f"the API key is read from the key token of Secret {WANDB_KEY['name']}; here: WANDB_API_KEY")
    return {"project": project or None, "entity": entity or None, "apiKeySecretRef": WANDB_KEY}


def mlflow(settings: Settings, uri: str, experiment: str) -> dict[str, Any] | None:
    """spec.tracking.mlflow; `uri` and `experiment`: the names of their settings."""
    where, named = settings.text(uri), settings.text(experiment)
    if where.startswith(("http://", "https://")):
        return {"uri": where, "experiment": named or None}
    settings.warn(uri, "tracking.mlflow has servers at http:// or https://; name one there")
    settings.warn(experiment, "tracking.mlflow needs the server's uri too; add it there")
    return None


def object_name(text: str) -> str:
    """A name for the FineTune: at most 40 letters, digits and dashes."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return plain[:40].strip("-") or "imported"
