"""How the blocks of each model type differ from Llama's: one row of facts per type, as transformers' classes have them.

Tests compare them with transformers: parameters, names of layers, and what a forward pass keeps for the backward one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GATED_IN_ONE = ("mlp.gate_up_proj", "mlp.down_proj")
TWO_LAYERS = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

# Bytes per value that an activation function keeps, in 16 and in 32 bit. gelu_new is written out in Python: a float32
# copy for pow, tanh and what is multiplied with it, where torch's own functions keep their input alone.
INPUT = (2, 4)
KEPT_BY_ACTIVATION = {"gelu_new": (14, 16)}


@dataclass(frozen=True)
class Family:
    """A model type. Each default is Llama's.

    `attention`: paths of query, key, value and output, or of all three in one and output. `gated`: the MLP multiplies
    two paths. `biases`: of query, key and value; of attention's output; of the MLP: yes, no, or the config's name of it.
    `norms`: of a block, over the hidden width; `norm_size`: vectors of a norm (2: with bias, 0: none); `qk_norm`: over
    each head, over all heads, or none. `positions`: rows of the position embedding beyond the model's positions, None
    without one. `scores`: bytes per head and pair of tokens that attention keeps, in 16 and 32 bit: none by a fused
    kernel. `padded`: samples cannot be packed without padding (layout.py measures it). `repeats`: keys and values are
    copied for each query head. `dropout`: the config's name of the dropout behind attention and MLP, which keeps a mask.
    `experts`: a router chooses between MLPs, beside `mlp` as the shared one; each keeps `expert_values` of its width.
    `sinks`: one value per head that attention can go to.
    `defaults`: what config.json may leave out.
    """

    block: str = "model.layers.{}"
    embedding: str = "model.embed_tokens"
    attention: tuple[str, ...] = ATTENTION
    mlp: tuple[str, ...] = GATED
    gated: bool = True
    biases: tuple[bool | str, bool | str, bool | str] = (False, False, False)
    norms: int = 2
    norm_size: int = 1
    qk_norm: str = ""
    more_norms: int = 0  # outside of the blocks, besides the last one
    positions: int | None = None
    head_bias: bool = False
    scores: tuple[int, int] = (0, 0)
    padded: bool = False
    repeats: bool = False
    dropout: str = ""
    experts: bool = False
    expert_values: int = 3
    expert_biases: bool = False
    shared_gate: tuple[str, ...] = ()
    sinks: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


BIASED = (True, True, True)
BY_CONFIG = ("attention_bias", "attention_bias", "mlp_bias")
ATTENTION_BY_CONFIG = ("attention_bias", "attention_bias", False)
TIED = {"tie_word_embeddings": True}
SEPARATE = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj")
WRITTEN_OUT = (6, 4)  # softmax in float32, and a copy in the values' format
CAPPED = (8, 8)  # the same, and what tanh made of the scores before and after

FAMILIES: dict[str, Family] = {
    "llama": Family(biases=BY_CONFIG),
    "mistral": Family(),
    "ministral": Family(),
    "granite": Family(biases=BY_CONFIG),
    "smollm3": Family(biases=BY_CONFIG, defaults=TIED),
    "qwen2": Family(biases=(True, False, False)),
    "qwen3": Family(biases=ATTENTION_BY_CONFIG, qk_norm="head", defaults={"head_dim": 128}),
    "gemma": Family(biases=ATTENTION_BY_CONFIG, defaults=TIED | {"head_dim": 256}),
    "gemma2": Family(
        biases=ATTENTION_BY_CONFIG, norms=4, scores=CAPPED, padded=True, repeats=True,
        defaults=TIED | {"head_dim": 256, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        biases=ATTENTION_BY_CONFIG, norms=4, qk_norm="head",
        defaults=TIED | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208},
    ),
    "phi3": Family(attention=("self_attn.qkv_proj", "self_attn.o_proj"), mlp=GATED_IN_ONE),
    "phi": Family(
        attention=(*ATTENTION[:3], "self_attn.dense"), mlp=("mlp.fc1", "mlp.fc2"), gated=False, biases=BIASED, norms=1,
        norm_size=2, head_bias=True, defaults={"hidden_act": "gelu_new"},
    ),
    "olmo": Family(biases=ATTENTION_BY_CONFIG, norm_size=0),
    "olmo2": Family(biases=ATTENTION_BY_CONFIG, qk_norm="all"),
    "olmo3": Family(biases=ATTENTION_BY_CONFIG, qk_norm="all"),
    "stablelm": Family(biases=("use_qkv_bias", False, False), norm_size=2),
    "starcoder2": Family(
        mlp=("mlp.c_fc", "mlp.c_proj"), gated=False, biases=("use_bias", "use_bias", "use_bias"), norm_size=2,
        defaults=TIED | {"use_bias": True},
    ),
    "cohere": Family(biases=ATTENTION_BY_CONFIG, norms=1, defaults=TIED),
    "cohere2": Family(biases=ATTENTION_BY_CONFIG, norms=1, defaults=TIED),
    "exaone4": Family(qk_norm="head"),
    "helium": Family(biases=ATTENTION_BY_CONFIG, defaults={"head_dim": 128}),
    "glm": Family(
        mlp=GATED_IN_ONE, biases=("attention_bias", False, False), defaults={"head_dim": 128}
    ),
    "glm4": Family(
        mlp=GATED_IN_ONE, biases=("attention_bias", False, False), norms=4, defaults={"head_dim": 128}
    ),
    "seed_oss": Family(
        biases=("attention_bias", "attention_out_bias", "mlp_bias"), dropout="residual_dropout",
        defaults={"head_dim": 128, "attention_bias": True, "residual_dropout": 0.1},
    ),
    "ernie4_5": Family(biases=("use_bias", "use_bias", "use_bias"), defaults=TIED | {"head_dim": 128}),
    "gpt2": Family(
        "transformer.h.{}", "transformer.wte", ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), False, BIASED,
        norm_size=2, positions=0, dropout="resid_pdrop",
        defaults=TIED | {
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50257,
            "max_position_embeddings": 1024, "hidden_act": "gelu_new", "resid_pdrop": 0.1,
        },
    ),
    "gpt_bigcode": Family(
        "transformer.h.{}", "transformer.wte", ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), False, BIASED,
        norm_size=2, positions=0, dropout="resid_pdrop",
        defaults=TIED | {"num_key_value_heads": 1, "max_position_embeddings": 1024, "resid_pdrop": 0.1},
    ),
    "gptj": Family(
        "transformer.h.{}", "transformer.wte", SEPARATE, ("mlp.fc_in", "mlp.fc_out"), False, (False, False, True),
        norms=1, norm_size=2, head_bias=True, scores=WRITTEN_OUT, dropout="resid_pdrop",
        defaults={"hidden_act": "gelu_new"},
    ),
    "gpt_neo": Family(
        "transformer.h.{}", "transformer.wte",
        ("attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.q_proj", "attn.attention.out_proj"),
        ("mlp.c_fc", "mlp.c_proj"), False, (False, True, True), norm_size=2, positions=0, scores=WRITTEN_OUT,
        dropout="resid_dropout", defaults=TIED | {"hidden_act": "gelu_new"},
    ),
    "gpt_neox": Family(
        "gpt_neox.layers.{}", "gpt_neox.embed_in", ("attention.query_key_value", "attention.dense"), TWO_LAYERS, False,
        ("attention_bias", "attention_bias", True), norm_size=2, dropout="hidden_dropout",
        defaults={"attention_bias": True},
    ),
    "bloom": Family(
        "transformer.h.{}", "transformer.word_embeddings", ("self_attention.query_key_value", "self_attention.dense"),
        TWO_LAYERS, False, BIASED, norm_size=2, more_norms=1, scores=WRITTEN_OUT, padded=True,
        dropout="hidden_dropout", defaults=TIED,
    ),
    "falcon": Family(
        "transformer.h.{}", "transformer.word_embeddings", ("self_attention.query_key_value", "self_attention.dense"),
        TWO_LAYERS, False, ("bias", "bias", "bias"), norm_size=2, scores=(4, 4), padded=True, dropout="hidden_dropout",
        defaults=TIED,
    ),
    "mixtral": Family(experts=True),
    "olmoe": Family(biases=ATTENTION_BY_CONFIG, experts=True, qk_norm="all"),
    "granitemoe": Family(biases=ATTENTION_BY_CONFIG, experts=True),
    "qwen2_moe": Family(
        mlp=tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")), biases=(True, False, False),
        experts=True, shared_gate=("mlp.shared_expert_gate",), defaults={"shared_expert_intermediate_size": 5632},
    ),
    "qwen3_moe": Family(
        biases=ATTENTION_BY_CONFIG, experts=True, qk_norm="head"
    ),
    "gpt_oss": Family(
        biases=(True, True, False), experts=True, expert_values=6, expert_biases=True, sinks=True, scores=(2, 4),
        padded=True, repeats=True, defaults={"head_dim": 64},
    ),
    "opt": Family(
        "model.decoder.layers.{}", "model.decoder.embed_tokens",
        (*ATTENTION[:3], "self_attn.out_proj"), ("fc1", "fc2"), False, BIASED, norm_size=2, positions=2,
        dropout="dropout", defaults=TIED | {"dropout": 0.1},
    ),
}  # fmt: skip
