"""A model's linear layers and parameter counts, from its config.json alone.

Names and shapes are those of transformers' classes; tests compare the counts with models built by transformers, and
with published ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.failures import BASE_MODEL_NOT_FOUND, RunFailure
from finetune_trainer.memory.families import FAMILIES, INPUT, KEPT_BY_ACTIVATION, Family

Config = Mapping[str, Any]

HEAD = "lm_head"  # the output head of every class in transformers that we know


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: its path within the block, its inputs, its outputs, whether it has a bias, and what
    it reads: layers that read the same share one tensor."""

    path: str
    inputs: int
    outputs: int
    bias: bool = False
    reads: str = ""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Experts:
    """The experts of a block, stacked into tensors that are no linear layers, and their router."""

    number: int
    chosen: int  # for each token
    intermediate: int
    parameters: int
    biases: int  # that are called so


@dataclass(frozen=True)
class Architecture:
    """What memory depends on."""

    model_type: str
    family: Family
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    query: int  # outputs of all query heads together
    key_value: int  # outputs of all key heads together
    linears: tuple[Linear, ...]
    norms: int  # of a block, over the hidden width
    head_norms: int  # values that a block's norms of queries and keys take in
    vectors: int  # parameters of a block in norms and the like
    embeddings: int  # parameters of all embeddings and norms outside of the blocks
    head: int  # parameters of the output head, 0 when it is the embedding
    norm_biases: int  # those of all LayerNorms; RMSNorm has none
    activation: str
    dropout: bool  # whether the model has a dropout of its own
    capped: bool  # whether tanh bounds the logits
    experts: Experts | None = None

    @property
    def block(self) -> str:
        """Where blocks are, e.g. model.layers.{}."""
        return self.family.block

    @property
    def embedding(self) -> str:
        """Full name of the word embedding."""
        return self.family.embedding

    @property
    def linear_weights(self) -> int:
        """Weights in the blocks' linear layers: what quantization shrinks."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def linear_biases(self) -> int:
        return self.layers * sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def biases(self) -> int:
        """Every parameter that is called bias."""
        experts = self.layers * self.experts.biases if self.experts else 0
        return self.linear_biases + self.norm_biases + experts + (self.vocabulary if self.family.head_bias else 0)

    @property
    def parameters(self) -> int:
        vectors = self.vectors + (self.experts.parameters if self.experts else 0)
        return self.linear_weights + self.linear_biases + self.layers * vectors + self.embeddings + self.head

    def kept(self, width: int, length: int) -> int:
        """Bytes per token that a block keeps for its backward pass, besides what a method's own layers keep.

        After Korthikanti et al. 2022 ("Reducing Activation Recomputation"), section 4, recounted for frozen weights,
        whose inputs need not be kept, as transformers' modules compute under CUDA's autocast. `width`: bytes of a
        value; `length`: tokens that each token is compared with where attention keeps its scores.
        """
        family, wide = self.family, width == 4
        norms = 4 * (self.norms * self.hidden + self.head_norms)  # they compute in float32
        if family.repeats:
            attention = width * 3 * self.query
        else:  # a fused kernel also keeps what comes out
            attention = width * (self.query + 2 * self.key_value + (0 if any(family.scores) else self.query))
        scores = self.heads * length * family.scores[wide]
        masks = 2 * self.hidden if self.dropout else 0
        two_layers = KEPT_BY_ACTIVATION.get(self.activation, INPUT)[wide] + (2 * width if family.gated else 0)
        mlp = self.intermediate * two_layers
        if self.experts:
            mlp += width * self.experts.chosen * (family.expert_values * self.experts.intermediate + self.hidden)
        return norms + attention + scores + masks + mlp

    def targets(
        self, asked: Iterable[str], excluded: Iterable[str] = (), only_layers: Iterable[int] = ()
    ) -> list[tuple[str, Linear]]:
        """(full name, layer) of each linear layer that `targetModules` means, as PEFT matches them."""
        asked, excluded, only = list(asked), list(excluded), set(only_layers)
        every = [
            (f"{self.block.format(number)}.{linear.path}", linear)
            for number in range(self.layers)
            if not only or number in only
            for linear in self.linears
        ]
        return [
            (name, linear)
            for name, linear in every
            if matches(name, asked) and not (excluded and matches(name, excluded))
        ]


def matches(name: str, asked: list[str]) -> bool:
    """Whether a full name is meant by all-linear, one regular expression, or names."""
    if asked == ["all-linear"]:
        return True
    if len(asked) == 1 and not asked[0].replace("_", "").replace(".", "").isalnum():
        return re.fullmatch(asked[0], name) is not None
    return any(name == one or name.endswith(f".{one}") for one in asked)


def read_config(directory: Path) -> Config:
    """config.json of a model; of a multimodal one the part of its language model. Raises: RunFailure."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except ValueError as error:
        raise RunFailure(BASE_MODEL_NOT_FOUND, f"the base model's config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RunFailure(BASE_MODEL_NOT_FOUND, "the base model's config.json is no JSON object")
    language: dict[str, Any] | None = config.get("text_config")
    return language or config


def architecture(config: Config) -> Architecture | None:
    """The architecture that a config describes, None when it is none that we know."""
    kind = str(config.get("model_type", ""))
    family = FAMILIES.get(kind)
    if family is None or any(config.get(name) for name in UNKNOWN):
        return None
    config = named(config, family)
    if not all(config.get(name) for name in NEEDED) or (family.gated and not config.get("intermediate_size")):
        return None
    if bool(family.experts) != bool(_experts_in(config)) or config.get("word_embed_proj_dim") not in (
        None,
        config["hidden_size"],
    ):
        return None
    return _build(kind, family, config)


NEEDED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
# Options of known types that move norms or layers.
UNKNOWN = ("qk_layernorm", "use_qk_norm", "mlp_only_layers", "first_k_dense_replace", "alibi")
OTHER_NAMES = {
    "hidden_size": ("n_embd", "n_embed"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions",),
    "hidden_act": ("activation_function", "hidden_activation"),
}


def named(config: Config, family: Family) -> dict[str, Any]:
    """A config with Llama's names, and the family's defaults for what it leaves out."""
    found = {**family.defaults, **{name: value for name, value in config.items() if value is not None}}
    for name, others in OTHER_NAMES.items():
        for other in others:
            if config.get(name) is None and config.get(other) is not None:
                found[name] = config[other]
    return found


def _experts_in(config: Config) -> int:
    return config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0


def _build(kind: str, family: Family, config: Config) -> Architecture:
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    heads, inner = config["num_attention_heads"], config.get("intermediate_size") or 4 * config["hidden_size"]
    head = config.get("head_dim") or hidden // heads
    query, key_value = heads * head, _key_value_heads(kind, config) * head
    qkv, out, mlp = (bool(config.get(bias, False)) if isinstance(bias, str) else bias for bias in family.biases)
    inside = config.get("shared_expert_intermediate_size", 0) if family.experts else inner
    linears = (
        *_attention(family, hidden, query, key_value, qkv, out),
        *(_mlp(family, hidden, inside, mlp) if inside else ()),
        *(Linear(path, hidden, 1, reads="mlp") for path in family.shared_gate),
    )
    norms = family.norms if kind != "falcon" else _falcon_norms(config)
    head_norms = {"head": 2 * head, "all": query + key_value, "": 0}[family.qk_norm]
    experts = _experts(family, config, hidden) if family.experts else None
    positions = 0 if family.positions is None else config["max_position_embeddings"] + family.positions
    outside = 1 + family.more_norms
    tied = config.get("tie_word_embeddings", False)
    return Architecture(
        model_type=kind,
        family=family,
        layers=layers,
        hidden=hidden,
        intermediate=inside,
        vocabulary=vocabulary,
        heads=heads,
        query=query,
        key_value=key_value,
        linears=linears,
        norms=norms,
        head_norms=query + key_value if family.qk_norm else 0,
        vectors=norms * family.norm_size * hidden + head_norms + (heads if family.sinks else 0),
        embeddings=(vocabulary + positions + outside * family.norm_size) * hidden,
        head=0 if tied else vocabulary * hidden + (vocabulary if family.head_bias else 0),
        norm_biases=(layers * norms + outside) * hidden if family.norm_size == 2 else 0,
        activation=str(config.get("hidden_act", "")),
        dropout=bool(config.get(family.dropout)),
        capped=bool(config.get("final_logit_softcapping")),
        experts=experts,
    )


def _attention(family: Family, hidden: int, query: int, key_value: int, qkv: bool, out: bool) -> tuple[Linear, ...]:
    *before, last = family.attention
    if len(before) == 1:
        return (
            Linear(before[0], hidden, query + 2 * key_value, qkv, "attention"),
            Linear(last, query, hidden, out, "heads"),
        )
    sizes = [query if path.endswith("q_proj") else key_value for path in before]
    return (
        *(Linear(path, hidden, size, qkv, "attention") for path, size in zip(before, sizes, strict=True)),
        Linear(last, query, hidden, out, "heads"),
    )


def _mlp(family: Family, hidden: int, inner: int, bias: bool) -> tuple[Linear, ...]:
    *before, last = family.mlp
    first = 2 * inner if family.gated and len(before) == 1 else inner
    return (
        *(Linear(path, hidden, first, bias, "mlp") for path in before),
        Linear(last, inner, hidden, bias, "product"),
    )


def _experts(family: Family, config: Config, hidden: int) -> Experts:
    number, inner = _experts_in(config), config.get("moe_intermediate_size") or config["intermediate_size"]
    biases = number * (2 * inner + hidden + 1) if family.expert_biases else 0
    parameters = number * 3 * inner * hidden + number * hidden + biases
    return Experts(number, config["num_experts_per_tok"], inner, parameters, number if biases else 0)


def _key_value_heads(kind: str, config: Config) -> int:
    heads: int = config["num_attention_heads"]
    if kind in ("falcon", "gpt_bigcode") and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else heads
    return config.get("num_key_value_heads") or heads


def _falcon_norms(config: Config) -> int:
    parallel = config.get("num_ln_in_parallel_attn", 2 if config.get("new_decoder_architecture") else 1)
    return 2 if not config.get("parallel_attn", True) or parallel == 2 else 1
