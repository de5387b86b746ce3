"""What LoRA can do with the experts of a mixture-of-experts model, whose weights are stacked tensors and no linear layers.

PEFT takes names of the layers that experts once were for these tensors (peft/utils/transformers_weight_conversion.py), and
all-linear with them. It refuses some options only when the base model is loaded, and does others wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.method import Lora
from finetune_trainer.methods.combinations import LORA_METHODS, is_pattern

# By what PEFT calls the architecture: names of an expert's layers and the router, and those that are one tensor.
NAMES = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
FUSED = {"mixtral": ("w1", "w3"), "qwen2_moe": ("gate_proj", "up_proj")}
MIXTRAL = frozenset({"mixtral", "minimax", "minimax_m2"})
QWEN2_MOE = frozenset(
    {
        "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "afmoe",
        "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
        "glm4v_moe", "longcat_flash", "solar_open", "mellum", "beam", "hunyuan_v1_moe", "flex_olmo", "olmoe", "exaone_moe",
        "cohere2_moe", "Dots3NoteTextModel", "UnlimitedOcrTextModel",
    }
)  # fmt: skip
WITHOUT = "leave the experts out, e.g. targetModules: [q_proj, k_proj, v_proj, o_proj]"


def family(config: Mapping[str, Any]) -> str:
    """What PEFT calls a model with experts that it can adapt; empty for any other."""
    kind = config.get("model_type")
    return "mixtral" if kind in MIXTRAL else "qwen2_moe" if kind in QWEN2_MOE else ""


def adapted(lora: Lora, names: Sequence[str]) -> list[str]:
    """Which of these names of experts' layers `targetModules` means."""
    asked = list(lora.target_modules)
    if asked == ["all-linear"]:
        # with layersToTransform the linear layers are written out (configs.py), and experts are none
        return [] if lora.layers_to_transform else list(names)
    if is_pattern(asked):
        return [name for name in names if re.fullmatch(asked[0], f"model.layers.0.mlp.experts.{name}")]
    return [name for name in names if any(one.rpartition(".")[2] == name for one in asked)]


def adapts_experts(spec: FineTuneSpec, config: Mapping[str, Any]) -> bool:
    """Whether a run trains experts: of what PEFT then needs, nothing is known beforehand."""
    kind = family(config) if spec.method.type in LORA_METHODS else ""
    return bool(kind and adapted(spec.method.lora, NAMES[kind]))


def expert_refusals(lora: Lora, config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with adapting the experts of this model; nothing where none are adapted."""
    kind = family(config)
    found = adapted(lora, NAMES[kind]) if kind else []
    if not found:
        return
    experts = f"the experts of this {config.get('model_type')} model are among targetModules"
    if lora.dropout:
        yield f"method.lora.dropout: {experts}, which PEFT adapts without dropout only; set it to 0, or {WITHOUT}"
    if lora.use_dora:
        yield f"method.lora.useDora: {experts}, which have no DoRA in PEFT; remove it, or {WITHOUT}"
    if lora.initialization not in ("Default", "Gaussian"):
        yield (
            f"method.lora.initialization: {experts}, and {lora.initialization} starts linear layers only; use Default, or "
            f"{WITHOUT}"
        )
    fused = FUSED[kind]
    if 0 < len(set(found) & set(fused)) < len(fused):
        yield (
            f"method.lora.targetModules: {' and '.join(fused)} of an expert are one tensor in this "
            f"{config.get('model_type')} model; name both, or none of them"
        )
