"""The architectures that a GGUF file can be made of: llama.cpp's name of each, its hyperparameters, its way with weights.

A model type is in the table when a model of that type, converted, has the same logits in llama.cpp
(tests/unit/trainer/test_gguf_architectures.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

Config = Mapping[str, Any]

CONVERT = "remove GGUF from output.exports; the Merged export can be given to llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Architecture:
    """What is peculiar to one model type."""

    arch: MODEL_ARCH
    #: llama.cpp turns pairs of neighbours where transformers turns the two halves of a head: rows of q and k are reordered.
    neighbours: bool = False
    #: Gemma's norms multiply by 1 + weight; llama.cpp's by the weight.
    norm_offset: bool = False


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, neighbours=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, neighbours=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "gemma": Architecture(MODEL_ARCH.GEMMA, norm_offset=True),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, norm_offset=True),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, norm_offset=True),
    "phi3": Architecture(MODEL_ARCH.PHI3),
    "olmo2": Architecture(MODEL_ARCH.OLMO2),
    "granite": Architecture(MODEL_ARCH.GRANITE, neighbours=True),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, neighbours=True),
}
SCALINGS = {
    "default": None,
    "llama3": None,  # a tensor of factors, see rope_factors
    "longrope": None,  # two of them
    "linear": RopeScalingType.LINEAR,
    "yarn": RopeScalingType.YARN,
}


def refusal(config: Config) -> str:
    """Why no GGUF file can be made of a model with this config.json; empty when one can."""
    model_type = str(config.get("model_type") or "")
    if model_type not in ARCHITECTURES:
        return f"output.exports: GGUF is not made of model type {model_type!r}, only of {', '.join(ARCHITECTURES)}; {CONVERT}"
    scaling = rope(config).get("rope_type", "default")
    if scaling not in SCALINGS:
        return f"output.exports: GGUF is not made of a model with rope scaling {scaling!r}; {CONVERT}"
    return ""


def rope(config: Config) -> dict[str, Any]:
    """The parameters of the rotary embedding, as transformers 5 writes them or as older versions did."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found = found.get("full_attention") or found  # gemma3: one set for each kind of layer
    found.setdefault("rope_type", found.get("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    return found


def head_size(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def describe(writer: GGUFWriter, config: Config) -> None:
    """The hyperparameters; `config` is complete, as transformers' to_dict gives it."""
    heads, size, scaling = int(config["num_attention_heads"]), head_size(config), rope(config)
    writer.add_context_length(context(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(int(size * float(scaling.get("partial_rotary_factor") or 1)))
    writer.add_rope_freq_base(scaling["rope_theta"])
    if kind := SCALINGS[scaling["rope_type"]]:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(scaling["factor"])
        if original := scaling.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)
    if scaling["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(_original(config))
        writer.add_rope_scaling_attn_factors(_attention_factor(config))
    _peculiar(writer, config)


def _peculiar(writer: GGUFWriter, config: Config) -> None:
    model_type = config["model_type"]
    if model_type in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(int(config.get("sliding_window") or 0))
    if model_type == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if model_type == "granite":
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def context(config: Config) -> int:
    """The longest text. llama.cpp gives these models no sliding window, which up to its length makes no difference."""
    longest = int(config["max_position_embeddings"])
    window = int(config.get("sliding_window") or 0)
    windowed = config["model_type"] in ("mistral", "phi3") or bool(config.get("use_sliding_window"))
    return min(longest, window) if window and windowed else longest


def rope_factors(config: Config) -> dict[str, list[float]]:
    """What a scaling divides each frequency by, as tensors (transformers, modeling_rope_utils); none without one."""
    scaling = rope(config)
    if scaling["rope_type"] == "longrope":  # Phi-3's: one for texts within the original length, one for longer ones
        return {f"rope_factors_{kind}.weight": list(scaling[f"{kind}_factor"]) for kind in ("short", "long")}
    if scaling["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config, scaling)}
    return {}


def _llama3_factors(config: Config, scaling: Mapping[str, Any]) -> list[float]:
    size, factor = head_size(config), float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    factors = []
    for i in range(0, size, 2):
        length = 2 * math.pi * float(scaling["rope_theta"]) ** (i / size)
        share = (original / length - low) / (high - low)
        factors.append(1 / (min(max(share, 0.0), 1.0) * (1 - 1 / factor) + 1 / factor))
    return factors


def _original(config: Config) -> int:
    """Phi-3 keeps the length before the scaling beside the scaling."""
    found = rope(config).get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(found or config["max_position_embeddings"])


def _attention_factor(config: Config) -> float:
    if given := rope(config).get("attention_factor"):
        return float(given)
    factor = int(config["max_position_embeddings"]) / _original(config)
    return math.sqrt(1 + math.log(factor) / math.log(_original(config))) if factor > 1 else 1.0
