"""LLaMA-Factory's YAML as a FineTune. Where it has another default than a FineTune, its own is written out.

Names and defaults: https://github.com/hiyouga/LLaMA-Factory/tree/main/src/llamafactory/hparams; datasets are names in
its data/dataset_info.json, which is read when it is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_trainer.importing import common
from finetune_trainer.importing.settings import CannotImport, Settings

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
    "report_to": common.METRICS,
    "run_name": common.METRICS,
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
        "prompt": "prompt", "messages": "prompt", "response": "completion", "kto_tag": "label", "system": "system"
    },
}  # fmt: skip


def convert(settings: Settings, folder: Path) -> dict[str, Any]:
    """spec of the FineTune; `folder` is where the file lies. Raises: CannotImport for what would train something else."""
    settings.refuse_if_set(_OTHER_RESULT)
    settings.take("do_train")
    if settings.take("do_predict"):
        raise settings.refuse("do_predict", "this file does not train; import the one that does")
    objective = _objective(settings)
    micro = int(settings.take("per_device_train_batch_size", 8))
    max_steps = settings.take("max_steps", -1)
    max_steps = max_steps if max_steps > 0 else None
    epochs = settings.take("num_train_epochs", 3.0)
    pretraining = settings.take("stage") == "pt"
    train, evaluation, form = _datasets(settings, objective["type"], pretraining, folder)
    spec = {
        "baseModel": common.base_model(settings, "model_name_or_path", "model_revision"),
        "dataset": {
            "train": train,
            "evaluation": evaluation or common.held_out(settings, "val_size"),
            "maxSamples": settings.take("max_samples"),
            **form,
        },
        "objective": objective,
        "method": _method(settings),
        "training": {
            "epochs": None if max_steps else float(epochs),
            "maxSteps": max_steps,
            "learningRate": float(settings.take("learning_rate", 5e-5)),
            "scheduler": settings.one_of("lr_scheduler_type", common.SCHEDULERS, "linear"),
            "warmupRatio": common.warmup_ratio(settings, max_steps, 0.0),
            "weightDecay": settings.take("weight_decay"),
            "maxGradNorm": settings.take("max_grad_norm"),
            "optimizer": settings.one_of("optim", common.OPTIMIZERS, "adamw_torch"),
            "batchSize": micro * int(settings.take("gradient_accumulation_steps", 1)),
            "microBatchSize": micro,
            "maxLength": settings.take("cutoff_len", 2048),
            "packing": _packing(settings, pretraining) if objective["type"] == "SFT" else None,
            "lossOn": "All" if settings.take("train_on_prompt") else None,
            "gradientCheckpointing": "Disabled" if settings.take("disable_gradient_checkpointing") else "Enabled",
            "precision": common.precision(settings),
            "neftuneAlpha": settings.take("neftune_noise_alpha"),
            "seed": settings.take("seed"),
        },
        "checkpoint": common.checkpoints(settings, settings.take("save_steps", 500)),
        "output": _output(settings),
    }
    for name, why in _SAME_RESULT.items():
        settings.warn(name, why)
    return spec


def _objective(settings: Settings) -> dict[str, Any]:
    stages = {"sft": "SFT", "pt": "SFT", "dpo": "DPO", "kto": "KTO", "rm": "Reward"}
    kind = settings.one_of("stage", stages, "sft")
    beta, loss = settings.take("pref_beta", 0.1), settings.take("pref_loss", "sigmoid")
    if kind == "DPO" and loss == "orpo":
        kind = "ORPO"
    elif kind == "DPO" and loss != "sigmoid":
        raise settings.refuse("pref_loss", "a FineTune has sigmoid (DPO) and orpo")
    return {"type": kind, "beta": beta if kind in ("DPO", "KTO", "ORPO") else None}


def _method(settings: Settings) -> dict[str, Any]:
    kind = settings.take("finetuning_type", "lora")
    if kind != "lora":
        raise settings.refuse("finetuning_type", "a FineTune trains adapters; set finetuning_type: lora")
    bits = settings.take("quantization_bit")
    by = settings.first("quantization_method", "quantization_backend")
    if bits and by not in (None, "bitsandbytes", "bnb"):
        raise settings.refuse("quantization_method", "a FineTune quantizes with bitsandbytes")
    if bits not in (None, 4, 8):
        raise settings.refuse("quantization_bit", "a FineTune has 4 and 8 bit")
    method: dict[str, Any] = {"type": "QLoRA" if bits == 4 else "LoRA", "lora": _lora(settings)}
    quant_type, double = settings.take("quantization_type", "nf4"), settings.take("double_quantization", True)
    if bits == 4:
        method["quantization"] = {"type": str(quant_type).upper(), "doubleQuant": bool(double)}
    elif bits == 8:
        method["quantization"] = {"type": "INT8"}
    return method


def _lora(settings: Settings) -> dict[str, Any]:
    rank, target = int(settings.take("lora_rank", 8)), str(settings.take("lora_target", "all"))
    whole = settings.take("additional_target")
    settings.warn("pissa_iter", "PiSSA takes the exact decomposition")
    settings.warn("pissa_convert", "the adapter is always converted to a plain LoRA")
    settings.warn("create_new_adapter", "a run always makes a new adapter")
    return {
        "rank": rank,
        "alpha": settings.take("lora_alpha", 2 * rank),
        "dropout": settings.take("lora_dropout", 0.0),
        "targetModules": ["all-linear"] if target == "all" else _names(target),
        "modulesToSave": _names(whole) if whole else None,
        "useDora": settings.take("use_dora") or None,
        "useRslora": settings.take("use_rslora") or None,
        "initialization": "PiSSA" if settings.take("pissa_init") else None,
        "loraPlusRatio": settings.take("loraplus_lr_ratio"),
    }


def _packing(settings: Settings, pretraining: bool) -> str:
    packed, neat = settings.take("packing", pretraining), settings.take("neat_packing")
    if packed and not neat:
        settings.warn("packing", "packed samples do not see each other here, as with neat_packing: true")
    return "Enabled" if packed or neat else "Disabled"


def _names(text: Any) -> list[str]:
    return [name.strip() for name in (text if isinstance(text, list) else str(text).split(","))]


def _datasets(
    settings: Settings, objective: str, pretraining: bool, folder: Path
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """(dataset.train, dataset.evaluation, format and columns)."""
    names = _names(settings.take("dataset", ""))
    if not names[0]:
        raise CannotImport("dataset: there is none; name one")
    known = _known_datasets(folder, str(settings.take("dataset_dir", "data")))
    forms = [_form(known.get(name), objective, pretraining) for name in names]
    missing = [name for name in names if name not in known]
    if missing:
        settings.warn("dataset", f"dataset_info.json does not tell what {', '.join(missing)} is: format Auto is taken")
    if len(names) > 1:
        settings.warn("max_samples", "it is per dataset there, and dataset.maxSamples is for all rows together")
    if any(form != forms[0] for form in forms):
        raise settings.refuse("dataset", "they have different formats or columns; bring them into one format and file")
    evaluation = settings.take("eval_dataset")
    held = _source(settings, "eval_dataset", _names(evaluation), known) if evaluation else None
    return _source(settings, "dataset", names, known), held, forms[0]


def _known_datasets(folder: Path, directory: str) -> dict[str, Any]:
    """dataset_info.json of the folder that dataset_dir names, from the file's own folder or one above it."""
    for start in (folder, *folder.resolve().parents):
        path = start / directory / "dataset_info.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    return {}


def _source(settings: Settings, field: str, names: list[str], known: dict[str, Any]) -> dict[str, Any]:
    entries = [known.get(name) or {} for name in names]
    if len(names) == 1 and (repo := entries[0].get("hf_hub_url")):
        return {
            "huggingFace": {"repo": repo, "subset": entries[0].get("subset"), "split": entries[0].get("split", "train")}
        }
    files = [str(entry.get("file_name") or f"{name}.jsonl") for name, entry in zip(names, entries, strict=True)]
    return common.to_be_uploaded(settings, field, files)


def _form(entry: dict[str, Any] | None, objective: str, pretraining: bool) -> dict[str, Any]:
    """format and columns of an entry of dataset_info.json."""
    if pretraining:
        form = "Text"
    elif entry is None:
        return {}
    elif objective != "SFT":
        form = "UnpairedPreference" if objective == "KTO" else "Preference"
    elif entry.get("formatting", "alpaca") == "alpaca":
        form = "Alpaca"
    else:
        form = "Messages" if (entry.get("tags") or {}).get("role_tag", "from") == "role" else "ShareGPT"
    columns = {
        _COLUMNS[form][theirs]: name
        for theirs, name in ((entry or {}).get("columns") or {}).items()
        if theirs in _COLUMNS[form] and _COLUMNS[form][theirs] != name
    }
    return {"format": form, "columns": columns}


def _output(settings: Settings) -> dict[str, Any] | None:
    pushed, repo = settings.take("push_to_hub"), settings.take("hub_model_id")
    private = settings.take("hub_private_repo")
    if not (pushed and repo):
        return None
    settings.warn("hub_model_id", "pushing needs a token: put one into Secret hugging-face, key token")
    return {"hub": {"repo": repo, "private": private, "tokenSecretRef": common.HUB_TOKEN}}
