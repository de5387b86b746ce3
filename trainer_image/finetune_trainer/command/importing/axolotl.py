"""axolotl's YAML as a FineTune. Where axolotl has another default than a FineTune, its own is written out.

Names and defaults: https://docs.axolotl.ai/docs/config-reference.html
"""

from __future__ import annotations

import re
from typing import Any

from finetune_operator.api.dataset import SPLIT
from finetune_trainer.command.importing import common
from finetune_trainer.command.importing.settings import CannotImport, Settings

NAME = "axolotl"
MARKS = frozenset({"base_model", "sequence_len", "micro_batch_size", "datasets", "adapter", "lora_r"})

_OTHER_RESULT = {
    "gptq": "GPTQ weights are not trained on; use adapter: qlora with load_in_4bit",
    "lora_model_dir": "training goes on from an adapter, a FineTune starts from the base model",
    "pretraining_dataset": "a FineTune does not pretrain; use datasets with type: completion",
    "relora": "ReLoRA trains other weights than LoRA",
    "unfrozen_parameters": "a FineTune trains adapters; use lora_modules_to_save for whole layers",
    "qat": "there is no quantization-aware training",
    "tokens": "new tokens change the vocabulary; a FineTune keeps the base model's",
    "added_tokens_overrides": "new tokens change the vocabulary; a FineTune keeps the base model's",
    "process_reward_model": "there are no process reward models",
}
_SAME_RESULT = {
    "model_type": "the architecture is read from config.json",
    "tokenizer_type": "the tokenizer is the base model's",
    "is_llama_derived_model": "the architecture is read from config.json",
    "is_mistral_derived_model": "the architecture is read from config.json",
    "tokenizer_use_fast": "the tokenizer is the base model's",
    "special_tokens": "the special tokens are the base model's",
    "dataset_prepared_path": "prepared data is in the bucket, by digest",
    "dataset_processes": "prepare needs no such setting",
    "output_dir": "artifacts go to output.s3.uri",
    "pad_to_sequence_len": "rows are not padded; the loss is the same",
    "eval_sample_packing": "evaluation does not depend on packing",
    "group_by_length": "rows are packed or batched without padding",
    "lora_fan_in_fan_out": "PEFT sees this by itself",
    "logging_steps": "every step is in metrics.jsonl",
    "evals_per_epoch": "base and adapter are evaluated at the end; with earlyStopping once per checkpoint",
    "eval_steps": "base and adapter are evaluated at the end; with earlyStopping once per checkpoint",
    "eval_batch_size": "evaluation takes the micro batch",
    "resume_from_checkpoint": "a run always goes on from its newest checkpoint",
    "auto_resume_from_checkpoints": "a run always goes on from its newest checkpoint",
    "flash_attention": common.ATTENTION,
    "sdp_attention": common.ATTENTION,
    "xformers_attention": common.ATTENTION,
    "attn_implementation": common.ATTENTION,
    "s2_attention": "the trainer chooses its attention",
    "tf32": "the GPU's default holds",
    "gradient_checkpointing_kwargs": "checkpointing is not reentrant",
    "deepspeed": common.SEVERAL_GPUS,
    "fsdp": common.SEVERAL_GPUS,
    "fsdp_config": common.SEVERAL_GPUS,
    "fsdp_version": common.SEVERAL_GPUS,
    "chat_template": common.TEMPLATE,
    "plugins": "extensions of axolotl",
    "lora_mlp_kernel": common.SPEED,
    "lora_qkv_kernel": common.SPEED,
    "lora_o_kernel": common.SPEED,
    "torch_compile": common.SPEED,
    "lora_on_cpu": "a matter of memory",
    "use_tensorboard": common.METRICS,
    "wandb_name": common.RUN_NAME,
    "wandb_run_id": common.RUN_NAME,
    "mlflow_run_name": common.RUN_NAME,
    "wandb_log_model": "adapters stay in the bucket; a tracker is told where",
    "wandb_watch": "trackers get the metrics of each step",
    "hf_mlflow_log_artifacts": "adapters stay in the bucket; a tracker is told where",
    "adam_beta1": "the optimizer's default holds",
    "adam_beta2": "the optimizer's default holds",
    "adam_epsilon": "the optimizer's default holds",
    "cosine_min_lr_ratio": "the rate falls to zero",
    "processor_type": "only text is learned: rows with images or sound are refused",
    "skip_prepare_dataset": "the data is always prepared before a GPU is asked for",
    "dataset_exact_deduplication": "duplicates are counted, not removed: remove them from the data",
    "curriculum_sampling": "rows are drawn by chance, by training.seed",
    "sample_packing_sequentially": "rows are packed best fit first",
    "eot_tokens": "the token that ends a turn is found in the chat template, and learned",
    "resize_token_embeddings_to_32x": "the vocabulary stays as it is; the result is the same",
    "loss_watchdog_threshold": "a run fails when its loss is no number; evaluation.gates judge the result",
    "loss_watchdog_patience": "a run fails when its loss is no number; evaluation.gates judge the result",
    "ddp_find_unused_parameters": common.SPEED,
    "low_cpu_mem_usage": "a matter of memory",
}
_WORDS = common.Words(
    epochs=("num_epochs", 1.0),
    micro_batch=("micro_batch_size", 1),
    max_length=("sequence_len", 512),
    scheduler=("lr_scheduler", "cosine"),
    optimizer=("optimizer", "adamw_torch_fused"),
    loss_on_prompts="train_on_inputs",
    warmup_ratio=0.03,
    batch="batch_size",
)
_INITIALIZATIONS = {
    "True": "Default", "gaussian": "Gaussian", "pissa": "PiSSA", "olora": "OLoRA", "eva": "EVA", "loftq": "LoftQ",
}  # fmt: skip
# Columns of preference data, by the last word of the dataset's type: {ours: theirs}.
_PREFERENCES = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "icr": {"prompt": "input"},
    "prompt_pairs": {},
    "ultra": {},
    "argilla_chat": {},
}
_WITH_MESSAGES = ("argilla_chat", "ultra")  # of these, those whose answers are messages


def convert(settings: Settings) -> dict[str, Any]:
    """spec of the FineTune. Raises: CannotImport for what would train something else."""
    settings.refuse_if_set(_OTHER_RESULT)
    objective = _objective(settings)
    packing, patience = settings.flag("sample_packing"), settings.count("early_stopping_patience")
    train, evaluation, form = _datasets(settings, objective["type"])
    spec = {
        "baseModel": common.base_model(settings, "base_model", "revision_of_model"),
        "dataset": {
            "train": train,
            "evaluation": evaluation or common.held_out(settings, "val_set_size"),
            "onTooLong": settings.one_of("excess_length_strategy", {"drop": "Drop", "truncate": "Truncate"}, "drop"),
            **form,
        },
        "objective": objective,
        "method": _method(settings),
        "training": {
            **common.training(settings, _WORDS),
            "packing": common.switch(bool(packing)) if objective["type"] == "SFT" else None,
            "gradientCheckpointing": _checkpointing(settings),
            "neftuneAlpha": settings.first_number("neftune_noise_alpha", "noisy_embedding_alpha"),
            "earlyStopping": {"patience": patience} if patience else None,
        },
        "checkpoint": _checkpoint(settings),
        "output": _output(settings),
        "tracking": _tracking(settings),
    }
    for name, why in _SAME_RESULT.items():
        settings.warn(name, why)
    return spec


def _tracking(settings: Settings) -> dict[str, Any] | None:
    project, entity = settings.text("wandb_project"), settings.text("wandb_entity")
    off = settings.text("wandb_mode") in ("disabled", "dryrun") or settings.flag("use_wandb") is False
    mlflow = common.mlflow(settings, "mlflow_tracking_uri", "mlflow_experiment_name")
    if settings.flag("use_mlflow") is False:
        mlflow = None
    wandb = common.wandb(settings, "wandb_project", project, entity) if project and not off else None
    return {"mlflow": mlflow, "wandb": wandb} if mlflow or wandb else None


def _checkpointing(settings: Settings) -> str | None:
    """training.gradientCheckpointing; axolotl also has words for where the activations go meanwhile."""
    if settings.take("gradient_checkpointing") in ("offload", "offload_disk"):
        settings.warn("gradient_checkpointing", "activations are computed again, not kept elsewhere")
        return "Enabled"
    asked = settings.flag("gradient_checkpointing")
    return None if asked is None else common.switch(asked)


def _objective(settings: Settings) -> dict[str, Any]:
    kind = settings.take("rl")
    if settings.flag("reward_model"):
        return {"type": "Reward"}
    if kind is None:
        return {"type": "SFT"}
    if kind not in ("dpo", "kto", "orpo"):
        raise settings.refuse("rl", "a FineTune has DPO, KTO and ORPO")
    beta = settings.first_number("rl_beta", "dpo_beta") if kind != "orpo" else settings.number("orpo_alpha")
    weights = {"desirableWeight": "kto_desirable_weight", "undesirableWeight": "kto_undesirable_weight"}
    return {
        "type": kind.upper(),
        "beta": beta,
        **{field: settings.number(name) if kind == "kto" else None for field, name in weights.items()},
    }


def _method(settings: Settings) -> dict[str, Any]:
    adapter = settings.take("adapter")
    if adapter is None:
        raise CannotImport(
            "adapter: it is not set, which is full fine-tuning; a FineTune trains adapters: set adapter: lora or qlora"
        )
    if adapter not in ("lora", "qlora"):
        raise settings.refuse("adapter", "a FineTune can be imported from lora and qlora")
    four, eight = settings.flag("load_in_4bit"), settings.flag("load_in_8bit")
    method: dict[str, Any] = {"type": "QLoRA" if adapter == "qlora" or four else "LoRA", "lora": _lora(settings)}
    if method["type"] == "QLoRA":
        method["quantization"] = _quantization(settings)
    elif eight:
        method["quantization"] = {"type": "INT8"}
    return method


def _lora(settings: Settings) -> dict[str, Any]:
    linear, named = settings.flag("lora_target_linear"), _targets(settings)
    targets = ["all-linear"] if linear else named
    if not targets:
        raise CannotImport("lora_target_modules: no layer is named; set it, or lora_target_linear: true")
    peft = settings.part("peft")
    loftq = peft.take("loftq_config")
    settings.finish(peft)
    start = settings.one_of("peft_init_lora_weights", _INITIALIZATIONS, "loftq" if loftq else "True")
    return {
        "rank": settings.count("lora_r", 8),
        "alpha": settings.number("lora_alpha", 8),
        "dropout": settings.number("lora_dropout", 0.0),
        "targetModules": targets,
        "modulesToSave": settings.names("lora_modules_to_save"),
        "useDora": settings.flag("peft_use_dora") or None,
        "useRslora": settings.flag("peft_use_rslora") or None,
        "initialization": None if start == "Default" else start,
        "layersToTransform": settings.first("peft_layers_to_transform", "lora_layers_to_transform"),
        "loraPlusRatio": settings.number("loraplus_lr_ratio"),
    }


def _targets(settings: Settings) -> list[str]:
    """Names of layers in a list; one text is a name or a regular expression, in which commas may be."""
    named = settings.take("lora_target_modules")
    return [named] if isinstance(named, str) else settings.names("lora_target_modules")


def _quantization(settings: Settings) -> dict[str, Any]:
    options = settings.part("bnb_config_kwargs")
    found = {
        "type": options.text("bnb_4bit_quant_type", "nf4").upper(),
        "doubleQuant": options.flag("bnb_4bit_use_double_quant", True),
    }
    settings.finish(options)
    return found


def _datasets(settings: Settings, objective: str) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """(dataset.train, dataset.evaluation, format and columns)."""
    entries = settings.parts("datasets")
    if not entries:
        raise CannotImport("datasets: there are none; name one with its path and type")
    tests = settings.parts("test_datasets")
    if len(tests) > 1:
        raise settings.refuse("test_datasets", "dataset.evaluation has one source; keep one")
    forms = [_form(settings, entry, objective) for entry in entries]
    if any(form != forms[0] for form in forms):
        raise CannotImport("datasets: they have different types or columns; bring them into one format and file")
    if len(entries) > 1:
        names = [entry.text("path") for entry in entries]
        return common.to_be_uploaded(settings, "datasets", names), None, forms[0]
    evaluation = _source(settings, tests[0]) if tests else None
    return _source(settings, entries[0]), evaluation, forms[0]


def _source(settings: Settings, entry: Settings) -> dict[str, Any]:
    path, named = entry.text("path"), entry.names("data_files")
    if not path:
        raise entry.refuse("path", "it is missing; name a file or a hub repository")
    if path.startswith("s3://"):
        return {"s3": {"uri": path}}
    if common.is_hub_repository(path) and not named:
        split = entry.text("split", "train")
        if not re.match(SPLIT, split):
            raise entry.refuse("split", "a FineTune reads one split or a slice of it, as in train[:10%]")
        return {
            "huggingFace": {
                "repo": path, "subset": entry.text("name"), "split": split, "revision": entry.text("revision")
            }
        }  # fmt: skip
    source = common.to_be_uploaded(entry, "data_files" if named else "path", named or [path])
    settings.warnings += entry.warnings
    return source


def _form(settings: Settings, entry: Settings, objective: str) -> dict[str, Any]:
    """format and columns of a dataset's type."""
    for name in ("path", "name", "split", "revision", "data_files", "ds_type"):
        entry.take(name)
    form = _preference(entry, entry.text("type")) if objective != "SFT" else _sft(entry)
    if objective == "KTO":
        form["format"] = "UnpairedPreference"
    for name in ("chat_template", "conversation"):
        entry.warn(name, common.TEMPLATE)
    entry.warn("roles", "roles are recognised: human is user, gpt is assistant")
    settings.finish(entry)
    return form


def _sft(entry: Settings) -> dict[str, Any]:
    if isinstance(entry.take("type"), dict):
        return _own_prompt(entry, entry.part("type"))
    name = entry.text("type").partition(":")[0].partition(".")[0]
    if name == "completion":
        return {"format": "Text", "columns": _renamed(text=entry.text("field"))}
    if name == "sharegpt":
        return {"format": "ShareGPT", "columns": _renamed(conversations=entry.text("field_messages"))}
    if name == "chat_template":
        return _chat(entry)
    if name.startswith("alpaca"):
        entry.warn("type", "axolotl's 'Below is an instruction' prompt becomes the base model's chat template")
        return {"format": "Alpaca"}
    raise entry.refuse("type", "no format of a FineTune; known are alpaca, sharegpt, chat_template and completion")


def _chat(entry: Settings) -> dict[str, Any]:
    names = entry.part("message_property_mappings")
    role = entry.text("message_field_role") or names.text("role", "role")
    content = entry.text("message_field_content") or names.text("content", "content")
    column = entry.text("field_messages", "messages")
    if entry.take("roles_to_train", ["assistant"]) not in (["assistant"], ["gpt"], ["assistant", "gpt"]):
        raise entry.refuse("roles_to_train", "a FineTune learns the assistant's turns; or all with training.lossOn")
    entry.warn("train_on_eos", "the end of each learned turn is learned")
    if (role, content) == ("from", "value"):
        return {"format": "ShareGPT", "columns": _renamed(conversations=None if column == "conversations" else column)}
    if (role, content) != ("role", "content"):
        raise entry.refuse("message_property_mappings", "messages have role and content, or from and value")
    return {"format": "Messages", "columns": _renamed(messages=None if column == "messages" else column)}


def _own_prompt(entry: Settings, kind: Settings) -> dict[str, Any]:
    columns = _renamed(
        instruction=kind.text("field_instruction"),
        input=kind.text("field_input"),
        output=kind.text("field_output"),
        system=kind.text("field_system"),
    )
    for name in ("format", "no_input_format", "system_format", "system_prompt"):
        kind.warn(name, "the prompt is written by the base model's chat template")
    entry.finish(kind)
    return {"format": "Alpaca", "columns": columns}


def _preference(entry: Settings, kind: str) -> dict[str, Any]:
    last = kind.rpartition(".")[2]
    if kind == "bradley_terry.chat_template":
        columns: dict[str, str | None] = {"prompt": "input"}
    elif kind.startswith("chat_template"):
        columns = {
            "prompt": entry.text("field_messages", "messages"),
            "chosen": entry.text("field_chosen"),
            "rejected": entry.text("field_rejected"),
        }
        entry.take("message_property_mappings")
    elif last in _PREFERENCES:
        columns = dict(_PREFERENCES[last])
        if last not in _WITH_MESSAGES:
            entry.warn("type", common.PLAIN_PROMPTS)
    else:
        raise entry.refuse("type", f"no preference format that is known; known are {', '.join(_PREFERENCES)}")
    return {"format": "Preference", "columns": _renamed(**columns)}


def _renamed(**columns: str | None) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if theirs and theirs != ours}


def _checkpoint(settings: Settings) -> dict[str, Any]:
    per_epoch = settings.number("saves_per_epoch")
    if per_epoch and per_epoch != 1:
        settings.warn("saves_per_epoch", "a FineTune saves every epoch, number of steps or time: epoch is taken")
    return common.checkpoints(settings, "epoch" if per_epoch else settings.count("save_steps"))


def _output(settings: Settings) -> dict[str, Any] | None:
    repo = settings.text("hub_model_id")
    settings.take("hub_strategy")
    if not repo:
        return None
    settings.warn("hub_model_id", "pushing needs a token: put one into Secret hugging-face, key token")
    return {"hub": {"repo": repo, "tokenSecretRef": common.HUB_TOKEN}}
