"""How an adapter can be served, from its adapter_config.json: whether vLLM can mount it, whether it can be merged.

The trainer says it in status.adapter, so that no pod is started in vain; the agent asks again before vLLM sees an
adapter, and merge before it merges. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The largest value that vLLM 0.32 takes for --max-lora-rank (vllm/config/lora.py).
LARGEST_RANK = 512
MERGE_INSTEAD = "serve it with mode: Merge"
# Methods whose adapter has no weights that could be merged: only the trainer's own library can run them.
PROMPT_METHODS = frozenset({"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT"})
# A reward model: vLLM's server would be asked for text.
SCORES = (
    "it scores answers and writes none (task_type SEQ_CLS); load it with AutoModelForSequenceClassification and PEFT, or "
    "export it merged (output.exports)"
)
# Initialisations that change the base model's weights as well; PEFT repeats that when it loads, vLLM cannot.
PLAIN_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})


def gives_scores(config: Mapping[str, Any]) -> bool:
    """Whether it is a reward model's adapter."""
    return config.get("task_type") == "SEQ_CLS"


def mount_refusal(config: Mapping[str, Any]) -> str:
    """Why vLLM 0.32 cannot mount an adapter (vllm/lora/peft_helper.py) and what to do; empty when it can."""
    method = config.get("peft_type")
    if gives_scores(config):
        return SCORES
    if method in PROMPT_METHODS:
        return f"vLLM cannot serve peft_type {method}; train with method.type LoRA or QLoRA"
    if method != "LORA":
        return f"vLLM cannot mount peft_type {method}; {MERGE_INSTEAD}"
    initialisation = config.get("init_lora_weights", True)
    found = [
        *(["modules_to_save"] if config.get("modules_to_save") else []),
        *(["trainable_token_indices"] if config.get("trainable_token_indices") else []),
        # experts as stacked tensors: vLLM reads them the other way round, or not at all (vllm-project/vllm#52194)
        *(["experts (target_parameters)"] if config.get("target_parameters") else []),
        *(["use_dora"] if config.get("use_dora") else []),
        *([f"bias {config['bias']}"] if config.get("bias", "none") != "none" else []),
        *(
            option
            for option in ("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
            if config.get(option)
        ),
        *(
            [f"init_lora_weights {initialisation}"]
            if isinstance(initialisation, str) and initialisation.lower() not in PLAIN_INITIALISATIONS
            else []
        ),
        *([f"rank {rank_of(config)} (its largest is {LARGEST_RANK})"] if rank_of(config) > LARGEST_RANK else []),
    ]
    return f"vLLM cannot mount {', '.join(found)}; {MERGE_INSTEAD}" if found else ""


def merge_refusal(config: Mapping[str, Any]) -> str:
    """Why an adapter cannot be served merged into its base model and what to do; empty when it can."""
    return SCORES if gives_scores(config) else fold_refusal(config)


def fold_refusal(config: Mapping[str, Any]) -> str:
    """Why an adapter cannot become a part of its base model's weights and what to do; empty when it can."""
    method = config.get("peft_type")
    if method in PROMPT_METHODS:
        return f"{method} adds tokens and changes no weights, so nothing can be merged; use method.type LoRA or QLoRA"
    if config.get("lora_bias"):
        return "lora_bias cannot be merged; train without it"
    return ""


def rank_of(config: Mapping[str, Any]) -> int:
    """The largest LoRA rank in an adapter, 0 for methods that have none."""
    return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
