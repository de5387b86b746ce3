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

Config = Mapping[str, Any]

HEAD = "lm_head"  # the output head of every class in transformers that we know


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: its path within the block, its inputs, its outputs, and whether it has a bias."""

    path: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Architecture:
    """What memory depends on. `norms`: parameters of a block that are in no linear layer."""

    model_type: str
    block: str  # where blocks are, e.g. model.layers.{}
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    query: int  # outputs of all query heads together
    key_value: int  # outputs of all key heads together
    linears: tuple[Linear, ...]
    norms: int
    embeddings: int  # parameters of all embeddings and the final norm
    head: int  # parameters of the output head, 0 when it is the embedding
    norm_biases: int = 0  # those of all LayerNorms; RMSNorm has none
    embedding: str = "model.embed_tokens"  # full name of the word embedding

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
        return self.linear_biases + self.norm_biases

    @property
    def parameters(self) -> int:
        return self.linear_weights + self.linear_biases + self.layers * self.norms + self.embeddings + self.head

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
    if config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts"):
        return None  # experts are not linear layers but stacked tensors: other rules hold
    build = OTHERS.get(kind)
    if build:
        return build(config)
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    return _llama(config) if kind in LLAMA_LIKE and all(name in config for name in needed) else None


LLAMA_LIKE = frozenset(
    {
        "llama",
        "mistral",
        "ministral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "granite",
        "olmo",
        "olmo2",
        "smollm3",
        "phi3",
        "stablelm",
        "exaone4",
        "helium",
        "glm",
        "glm4",
    }
)


def _llama(config: Config) -> Architecture:
    kind, hidden, intermediate = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    query, key_value = heads * head, (config.get("num_key_value_heads") or heads) * head
    qkv_bias = bool(config.get("attention_bias", kind == "qwen2"))
    out_bias = bool(config.get("attention_bias", False)) and kind != "glm"
    mlp_bias = bool(config.get("mlp_bias", False))
    if kind in ("phi3", "glm", "glm4"):
        mlp: tuple[Linear, ...] = (
            Linear("mlp.gate_up_proj", hidden, 2 * intermediate),
            Linear("mlp.down_proj", intermediate, hidden),
        )
    else:
        mlp = (
            Linear("mlp.gate_proj", hidden, intermediate, mlp_bias),
            Linear("mlp.up_proj", hidden, intermediate, mlp_bias),
            Linear("mlp.down_proj", intermediate, hidden, mlp_bias),
        )
    if kind == "phi3":
        attention: tuple[Linear, ...] = (Linear("self_attn.qkv_proj", hidden, query + 2 * key_value),)
    else:
        attention = (
            Linear("self_attn.q_proj", hidden, query, qkv_bias),
            Linear("self_attn.k_proj", hidden, key_value, qkv_bias),
            Linear("self_attn.v_proj", hidden, key_value, qkv_bias),
        )
    norms = {"gemma2": 4, "gemma3": 4, "gemma3_text": 4, "glm4": 4, "olmo": 0}.get(kind, 2) * hidden
    if kind in ("qwen3", "gemma3", "gemma3_text"):
        norms += 2 * head
    elif kind in ("olmo2", "exaone4"):
        norms += (query + key_value) if kind == "olmo2" else 2 * head
    elif kind == "stablelm":
        norms *= 2  # LayerNorm with bias
    vocabulary = config["vocab_size"]
    final = {"olmo": 0, "stablelm": 2 * hidden}.get(kind, hidden)
    tied = config.get("tie_word_embeddings", kind.startswith("gemma"))
    return Architecture(
        model_type=kind,
        block="model.layers.{}",
        layers=config["num_hidden_layers"],
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
        query=query,
        key_value=key_value,
        linears=(*attention, Linear("self_attn.o_proj", query, hidden, out_bias), *mlp),
        norms=norms,
        embeddings=vocabulary * hidden + final,
        head=0 if tied else vocabulary * hidden,
        norm_biases=(2 * config["num_hidden_layers"] + 1) * hidden if kind == "stablelm" else 0,
    )


def _gpt2(config: Config) -> Architecture:
    hidden = config.get("n_embd", config.get("hidden_size", 768))
    inner = config.get("n_inner") or 4 * hidden
    return _classic(
        "gpt2", "transformer.h.{}", config.get("n_layer", 12), hidden, inner, hidden,
        config.get("vocab_size", 50257), config.get("n_positions", 1024) * hidden, True,
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), embedding="transformer.wte",
    )  # fmt: skip


def _gpt_neo(config: Config) -> Architecture:
    hidden, layers = config["hidden_size"], config.get("num_layers") or config["num_hidden_layers"]
    inner = config.get("intermediate_size") or 4 * hidden
    attention = tuple(Linear(f"attn.attention.{name}", hidden, hidden) for name in ("k_proj", "v_proj", "q_proj"))
    return Architecture(
        "gpt_neo", "transformer.h.{}", layers, hidden, inner, config["vocab_size"], hidden, hidden,
        (*attention, Linear("attn.attention.out_proj", hidden, hidden, True),
         Linear("mlp.c_fc", hidden, inner, True), Linear("mlp.c_proj", inner, hidden, True)), 4 * hidden,
        (config["vocab_size"] + config["max_position_embeddings"] + 2) * hidden, 0,
        norm_biases=(2 * layers + 1) * hidden, embedding="transformer.wte",
    )  # fmt: skip


def _gpt_neox(config: Config) -> Architecture:
    hidden = config["hidden_size"]
    return _classic(
        "gpt_neox", "gpt_neox.layers.{}", config["num_hidden_layers"], hidden, config["intermediate_size"], hidden,
        config["vocab_size"], 0, config.get("tie_word_embeddings", False),
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        embedding="gpt_neox.embed_in",
    )  # fmt: skip


def _bloom(config: Config) -> Architecture:
    hidden = config.get("hidden_size") or config["n_embed"]
    return _classic(
        "bloom", "transformer.h.{}", config.get("n_layer") or config["num_hidden_layers"], hidden, 4 * hidden, hidden,
        config["vocab_size"], 2 * hidden, True,  # a norm behind the embeddings
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )  # fmt: skip


def _falcon(config: Config) -> Architecture:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    new = bool(config.get("new_decoder_architecture"))
    kv_heads = (config.get("num_kv_heads") or heads) if new else (1 if config.get("multi_query", True) else heads)
    key_value = kv_heads * (hidden // heads)
    built = _classic(
        "falcon", "transformer.h.{}", config["num_hidden_layers"], hidden,
        config.get("ffn_hidden_size") or 4 * hidden, key_value,
        config["vocab_size"], 0, config.get("tie_word_embeddings", True),
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        bias=bool(config.get("bias", False)),
        norms=(4 if new and config.get("num_ln_in_parallel_attn", 2) == 2 else 2) * hidden,
    )  # fmt: skip
    return built


def _opt(config: Config) -> Architecture:
    hidden, inner = config["hidden_size"], config["ffn_dim"]
    attention = tuple(
        Linear(f"self_attn.{name}", hidden, hidden, True) for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    )
    return Architecture(
        "opt", "model.decoder.layers.{}", config["num_hidden_layers"], hidden, inner, config["vocab_size"],
        hidden, hidden,
        (*attention, Linear("fc1", hidden, inner, True), Linear("fc2", inner, hidden, True)), 4 * hidden,
        config["vocab_size"] * hidden + (config["max_position_embeddings"] + 2) * hidden + 2 * hidden, 0,
        norm_biases=(2 * config["num_hidden_layers"] + 1) * hidden, embedding="model.decoder.embed_tokens",
    )  # fmt: skip


def _classic(
    kind: str, block: str, layers: int, hidden: int, inner: int, key_value: int, vocabulary: int, more_embeddings: int,
    tied: bool,
    paths: tuple[str, str, str, str], *, bias: bool = True, norms: int | None = None,
    embedding: str = "transformer.word_embeddings",
) -> Architecture:  # fmt: skip
    """A block with one projection for query, key and value, and a plain two-layer MLP."""
    shapes = ((hidden, hidden + 2 * key_value), (hidden, hidden), (hidden, inner), (inner, hidden))
    norms = 4 * hidden if norms is None else norms
    final = hidden + (hidden if kind == "bloom" else 0)  # a norm behind the embeddings, too
    return Architecture(
        model_type=kind,
        block=block,
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        vocabulary=vocabulary,
        query=hidden,
        key_value=key_value,
        linears=tuple(Linear(path, *shape, bias) for path, shape in zip(paths, shapes, strict=True)),
        norms=norms,
        embeddings=vocabulary * hidden + more_embeddings + 2 * hidden,
        head=0 if tied else vocabulary * hidden,
        norm_biases=layers * norms // 2 + final,
        embedding=embedding,
    )


OTHERS = {
    "gpt2": _gpt2, "gpt_neo": _gpt_neo, "gpt_neox": _gpt_neox, "bloom": _bloom, "falcon": _falcon, "opt": _opt,
}  # fmt: skip
