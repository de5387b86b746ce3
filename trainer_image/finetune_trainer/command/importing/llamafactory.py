"""LLaMA-Factory's YAML as a FineTune. Where it has another default than a FineTune, its own is written out.

Names and defaults: https://github.com/hiyouga/LLaMA-Factory/tree/main/src/llamafactory/hparams; datasets are names in
its data/dataset_info.json, which is read when it is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_trainer.command.importing import common
from finetune_trainer.command.importing.settings import CannotImport, Settings

NAME = "llama-factory"
MARKS = frozenset({"model_name_or_path", "finetuning_type", "stage", "cutoff_len", "template", "lora_target"})

_OTHER_RESULT = {
    "adapter_name_or_path": "training goes on from an adapter, a FineTune starts from the base model",
    "mask_history": "a FineTune learns every assistant turn",
    "efficient_eos": "the end token is the base model's",
    "resize_vocab": "a FineTune keeps the base model's vocabulary",
    "add_tokens": "a FineTune keeps the base model's vocabulary",
    "rope_scaling": "a FineTune keeps the base model's positions; lower cutoff_len",
    "use_galore": "GaLore trains the whole model",
    "use_apollo": "APOLLO trains the whole model",
    "use_badam": "BAdam trains the whole model",
    "use_muon": "there is no such optimizer",
    "use_llama_pro": "LLaMA Pro trains added blocks",
    "use_dft_loss": "there is no such loss",
    "pref_ftx": "there is no SFT term in DPO",
    "interleave_probs": "datasets are not mixed by chance",
    "streaming": "a FineTune reads all of its data, in bounded memory",
}
_SAME_RESULT = {
    "template": common.TEMPLATE,
    "overwrite_cache": "prepared data is in the bucket, by digest",
    "tokenized_path": "prepared data is in the bucket, by digest",
    "preprocessing_num_workers": "prepare needs no such setting",
    "dataloader_num_workers": "the trainer needs no such setting",
    "output_dir": "artifacts go to output.s3.uri",
    "overwrite_output_dir": "artifacts go to output.s3.uri, by digest",
    "logging_steps": "every step is in metrics.jsonl",
    "logging_dir": common.METRICS,
    "plot_loss": "report.html has the curve",
    "run_name": common.RUN_NAME,
    "include_num_input_tokens_seen": common.METRICS,
    "resume_from_checkpoint": "a run always goes on from its newest checkpoint",
    "save_only_model": "checkpoints have all that a run needs to go on",
    "eval_steps": "base and adapter are evaluated at the end; with earlyStopping once per checkpoint",
    "eval_strategy": "base and adapter are evaluated at the end; with earlyStopping once per checkpoint",
    "evaluation_strategy": "base and adapter are evaluated at the end; with earlyStopping once per checkpoint",
    "per_device_eval_batch_size": "evaluation takes the micro batch",
    "do_eval": "held-out rows are always evaluated",
    "flash_attn": common.ATTENTION,
    "use_unsloth": common.SPEED,
    "enable_liger_kernel": common.SPEED,
    "group_by_length": "rows are packed or batched without padding",
    "ddp_timeout": "the trainer needs no such setting",
    "deepspeed": common.SEVERAL_GPUS,
    "fsdp": common.SEVERAL_GPUS,
    "fsdp_config": common.SEVERAL_GPUS,
    "adam_beta1": "the optimizer's default holds",
    "adam_beta2": "the optimizer's default holds",
    "adam_epsilon": "the optimizer's default holds",
    "ref_model": "the reference is the base model without its adapter",
}
_WORDS = common.Words(
    epochs=("num_train_epochs", 3.0),
    micro_batch=("per_device_train_batch_size", 8),
    max_length=("cutoff_len", 2048),
    scheduler=("lr_scheduler_type", "linear"),
    optimizer=("optim", "adamw_torch"),
    loss_on_prompts="train_on_prompt",
    warmup_ratio=0.0,
)
# formatting in dataset_info.json -> {its column: ours}
_COLUMNS = {
    "Alpaca": {"prompt": "instruction", "query": "input", "response": "output", "system": "system"},
    "ShareGPT": {"messages": "conversations", "system": "system"},
    "Messages": {"messages": "messages", "system": "system"},
    "Text": {"prompt": "text"},
    "Preference": {
        "prompt": "prompt", "messages": "prompt", "chosen": "chosen", "rejected": "rejected", "system": "system"
    },
    "UnpairedPreference": {
        "prompt": "prompt", "messages": "completion", "response": "completion", "kto_tag": "label", "system": "system"
    },
}  # fmt: skip


def convert(settings: Settings, folder: Path) -> dict[str, Any]:
    """spec of the FineTune; `folder` is where the file lies. Raises: CannotImport for what would train something else."""
    settings.refuse_if_set(_OTHER_RESULT)
    settings.take("do_train")
    if settings.flag("do_predict"):
        raise settings.refuse("do_predict", "this file does not train; import the one that does")
    objective = _objective(settings)
    pretraining = settings.take("stage") == "pt"
    train, evaluation, form = _datasets(settings, objective["type"], pretraining, folder)
    spec = {
        "baseModel": common.base_model(settings, "model_name_or_path", "model_revision"),
        "dataset": {
            "train": train,
            "evaluation": evaluation or common.held_out(settings, "val_size"),
            "maxSamples": settings.count("max_samples"),
            **form,
        },
        "objective": objective,
        "method": _method(settings),
        "training": {
            **common.training(settings, _WORDS),
            "packing": _packing(settings, pretraining) if objective["type"] == "SFT" else None,
            "gradientCheckpointing": common.switch(not settings.flag("disable_gradient_checkpointing")),
            "neftuneAlpha": settings.number("neftune_noise_alpha"),
        },
        "checkpoint": common.checkpoints(settings, settings.count("save_steps", 500)),
        "output": _output(settings),
        "tracking": _tracking(settings),
    }
    for name, why in _SAME_RESULT.items():
        settings.warn(name, why)
    return spec


def _tracking(settings: Settings) -> dict[str, Any] | None:
    asked = set(settings.names("report_to"))
    if "wandb" in asked:
        return {"wandb": common.wandb(settings, "report_to")}
    settings.warn("report_to", "name the server in tracking.mlflow.uri" if "mlflow" in asked else common.METRICS)
    return None


def _objective(settings: Settings) -> dict[str, Any]:
    stages = {"sft": "SFT", "pt": "SFT", "dpo": "DPO", "kto": "KTO", "rm": "Reward"}
    kind = settings.one_of("stage", stages, "sft")
    beta, loss = settings.number("pref_beta", 0.1), settings.take("pref_loss", "sigmoid")
    if kind == "DPO" and loss == "orpo":
        kind = "ORPO"
    elif kind == "DPO" and loss != "sigmoid":
        raise settings.refuse("pref_loss", "a FineTune has sigmoid (DPO) and orpo")
    weights = {"desirableWeight": "kto_chosen_weight", "undesirableWeight": "kto_rejected_weight"}
    return {
        "type": kind,
        "beta": beta if kind in ("DPO", "KTO", "ORPO") else None,
        **{field: settings.number(name) if kind == "KTO" else None for field, name in weights.items()},
    }


def _method(settings: Settings) -> dict[str, Any]:
    kind = settings.take("finetuning_type", "lora")
    if kind != "lora":
        raise settings.refuse("finetuning_type", "a FineTune trains adapters; set finetuning_type: lora")
    bits = settings.count("quantization_bit")
    by = settings.first("quantization_method", "quantization_backend")
    if bits and by not in (None, "bitsandbytes", "bnb"):
        raise settings.refuse("quantization_method", "a FineTune quantizes with bitsandbytes")
    if bits not in (None, 4, 8):
        raise settings.refuse("quantization_bit", "a FineTune has 4 and 8 bit")
    method: dict[str, Any] = {"type": "QLoRA" if bits == 4 else "LoRA", "lora": _lora(settings)}
    quant_type, double = settings.text("quantization_type", "nf4"), settings.flag("double_quantization", True)
    if bits == 4:
        method["quantization"] = {"type": quant_type.upper(), "doubleQuant": double}
    elif bits == 8:
        method["quantization"] = {"type": "INT8"}
    return method


def _lora(settings: Settings) -> dict[str, Any]:
    rank, targets = settings.count("lora_rank", 8), settings.names("lora_target")
    settings.warn("pissa_iter", "PiSSA takes the exact decomposition")
    settings.warn("pissa_convert", "the adapter is always converted to a plain LoRA")
    settings.warn("create_new_adapter", "a run always makes a new adapter")
    return {
        "rank": rank,
        "alpha": settings.number("lora_alpha", 2 * rank),
        "dropout": settings.number("lora_dropout", 0.0),
        "targetModules": ["all-linear"] if targets in ([], ["all"]) else targets,
        "modulesToSave": settings.names("additional_target"),
        "useDora": settings.flag("use_dora") or None,
        "useRslora": settings.flag("use_rslora") or None,
        "initialization": "PiSSA" if settings.flag("pissa_init") else None,
        "loraPlusRatio": settings.number("loraplus_lr_ratio"),
    }


def _packing(settings: Settings, pretraining: bool) -> str:
    packed, neat = settings.flag("packing", pretraining), settings.flag("neat_packing")
    if packed and not neat:
        settings.warn("packing", "packed samples do not see each other here, as with neat_packing: true")
    return common.switch(bool(packed or neat))


def _datasets(
    settings: Settings, objective: str, pretraining: bool, folder: Path
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """(dataset.train, dataset.evaluation, format and columns)."""
    names = settings.names("dataset")
    if not names:
        raise CannotImport("dataset: there is none; name one")
    known = _known_datasets(folder, settings.text("dataset_dir", "data"))
    forms = [_form(settings, known.get(name), objective, pretraining) for name in names]
    missing = [name for name in names if name not in known]
    if missing:
        settings.warn("dataset", f"dataset_info.json does not tell what {', '.join(missing)} is: format Auto is taken")
    if len(names) > 1:
        settings.warn("max_samples", "it is per dataset there, and dataset.maxSamples is for all rows together")
    if any(form != forms[0] for form in forms):
        raise settings.refuse("dataset", "they have different formats or columns; bring them into one format and file")
    evaluation = settings.names("eval_dataset")
    held = _source(settings, "eval_dataset", evaluation, known) if evaluation else None
    return _source(settings, "dataset", names, known), held, forms[0]


def _known_datasets(folder: Path, directory: str) -> dict[str, Settings]:
    """dataset_info.json of the folder that dataset_dir names, from the file's own folder or one above it."""
    for start in (folder, *folder.resolve().parents):
        path = start / directory / "dataset_info.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CannotImport(f"{path} cannot be read: {error}") from error
            if not isinstance(found, dict):
                raise CannotImport(f"{path} holds no datasets; each is a name with settings of its own")
            entries = Settings(found, f"{path}: ")
            return {name: entries.part(name) for name, entry in found.items() if isinstance(entry, dict)}
    return {}


def _source(settings: Settings, field: str, names: list[str], known: dict[str, Settings]) -> dict[str, Any]:
    entries = [known.get(name, Settings({})) for name in names]
    if len(names) == 1 and (repo := entries[0].text("hf_hub_url")):
        subset, split = entries[0].text("subset"), entries[0].text("split", "train")
        return {"huggingFace": {"repo": repo, "subset": subset, "split": split}}
    files = [entry.text("file_name", f"{name}.jsonl") for name, entry in zip(names, entries, strict=True)]
    return common.to_be_uploaded(settings, field, files)


def _form(settings: Settings, entry: Settings | None, objective: str, pretraining: bool) -> dict[str, Any]:
    """format and columns of an entry of dataset_info.json."""
    if pretraining:
        form = "Text"
    elif entry is None:
        return {}
    elif objective != "SFT":
        form = "UnpairedPreference" if objective == "KTO" else "Preference"
    elif entry.text("formatting", "alpaca") == "alpaca":
        form = "Alpaca"
    else:
        form = "Messages" if entry.part("tags").text("role_tag", "from") == "role" else "ShareGPT"
    named = entry.part("columns") if entry else Settings({})
    for name in ("images", "videos", "audios"):
        if named.take(name):
            raise named.refuse(name, "a FineTune learns from text alone; take a dataset without it")
    if entry and objective != "SFT" and entry.text("formatting", "alpaca") == "alpaca":
        settings.warn("dataset", common.PLAIN_PROMPTS)
    columns = {ours: name for theirs, ours in _COLUMNS[form].items() if (name := named.text(theirs)) and name != ours}
    return {"format": form, "columns": columns}


def _output(settings: Settings) -> dict[str, Any] | None:
    pushed, repo = settings.flag("push_to_hub"), settings.text("hub_model_id")
    private = settings.flag("hub_private_repo")
    if not (pushed and repo):
        return None
    settings.warn("hub_model_id", "pushing needs a token: put one into Secret hugging-face, key token")
    return {"hub": {"repo": repo, "private": private, "tokenSecretRef": common.HUB_TOKEN}}
