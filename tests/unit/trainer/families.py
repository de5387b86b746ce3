"""Small configurations of every family of models that config.json alone is enough for."""

from pathlib import Path
from typing import Any

from .tiny import VOCABULARY, make_tokenizer

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2},
    "mistral": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2},
    "qwen2": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32},
    "gemma": SMALL | {"intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 16},
    "gemma2": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16},
    "phi3": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0},
    "granite": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2},
    "olmo2": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2},
    "smollm3": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "vocab_size": 128, "max_position_embeddings": 32},
    "gpt_neox": SMALL | {"intermediate_size": 96},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "falcon": SMALL | {"new_decoder_architecture": False, "multi_query": True},
    "opt": SMALL | {"ffn_dim": 96, "max_position_embeddings": 32, "word_embed_proj_dim": 64, "pad_token_id": 0},
}  # fmt: skip

GROUPED = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0}
EXPERTS = GROUPED | {"num_experts_per_tok": 2}
# The others that config.json alone is enough for: counted here, measured by bench/memory.py.
KNOWN: dict[str, dict[str, Any]] = FAMILIES | {
    **dict.fromkeys(("phi", "olmo", "olmo3", "stablelm", "starcoder2", "cohere", "cohere2", "exaone4"), GROUPED),
    **dict.fromkeys(("helium", "glm", "glm4", "seed_oss", "ernie4_5"), GROUPED | {"head_dim": 16}),
    "ministral": GROUPED | {"head_dim": 16},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32, "rotary_dim": 4},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "granitemoe": EXPERTS | {"num_local_experts": 4},
    "olmoe": EXPERTS | {"num_experts": 4},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "gpt_oss": EXPERTS | {"num_local_experts": 4, "head_dim": 16},
}  # fmt: skip


def make_model(folder: Path, kind: str) -> Path:
    """A small model of a family with the tiny tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    known = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    positions = {name: 512 for name in ("n_positions", "max_position_embeddings") if name in FAMILIES[kind]}
    config = AutoConfig.for_model(kind, **FAMILIES[kind] | known | positions)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
