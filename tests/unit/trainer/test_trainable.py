"""Counts of trained parameters are exact: PEFT's own, for every method, option and family of models."""

from functools import cache
from typing import Any

import pytest
import torch

from finetune_trainer.memory.architecture import architecture
from finetune_trainer.memory.trainable import trainable_parameters
from finetune_trainer.methods.configs import peft_config

from .families import KNOWN
from .test_methods import lora
from .tiny import finetune_spec

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_7B = LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("config", "rank", "targets", "count"),
    [
        (LLAMA_8B, 16, ATTENTION, 13_631_488),
        (LLAMA_8B, 16, ["all-linear"], 41_943_040),
        (LLAMA_7B, 16, ATTENTION, 16_777_216),  # often published as 33,554,432, which is rank 32
        (LLAMA_7B, 8, ["q_proj", "v_proj"], 4_194_304),
        (LLAMA_70B, 64, ["all-linear"], 828_375_040),
    ],
)
def test_published_counts_are_met(config: dict[str, Any], rank: int, targets: list[str], count: int) -> None:
    shape = architecture(config)
    assert shape
    assert trainable_parameters(shape, finetune_spec(method=lora(rank=rank, targetModules=targets))) == count


@cache
def network(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KNOWN[kind]))


def counted_by_peft(kind: str, spec: Any) -> int:
    from copy import deepcopy

    from peft import get_peft_model

    model = deepcopy(network(kind))
    with torch.device("meta"):
        trained, _ = get_peft_model(model, peft_config(spec, 100, model)).get_nb_trainable_parameters()
    return int(trained)


def counted(kind: str, spec: Any) -> int:
    shape = architecture(network(kind).config.to_dict())
    assert shape
    return trainable_parameters(shape, spec)


EVERYWHERE: dict[str, dict[str, Any]] = {
    "lora": lora(),
    "dora": lora(useDora=True),
    "bias of the targets": lora(bias="LoraOnly"),
    "all biases": lora(bias="All"),
    "adalora": {"type": "AdaLoRA", "adaLora": {"initialRank": 6, "targetRank": 3}},
    "ia3": {"type": "IA3"},
    "ia3 of every layer": {"type": "IA3", "ia3": {"targetModules": ["all-linear"]}},
    "prefix": {"type": "PrefixTuning", "virtualTokens": {"count": 3}},
    "prefix with projection": {"type": "PrefixTuning", "virtualTokens": {"count": 3, "projection": True}},
    "prompt": {"type": "PromptTuning", "virtualTokens": {"count": 3}},
    "p-tuning": {"type": "PTuning", "virtualTokens": {"count": 3}},
}


@pytest.mark.parametrize("kind", KNOWN)
def test_counts_are_those_of_transformers_and_peft(kind: str) -> None:
    shape = architecture(network(kind).config.to_dict())
    assert shape
    assert shape.parameters == sum(parameter.numel() for parameter in network(kind).parameters())
    found, wanted = {}, {}
    for name, method in EVERYWHERE.items():
        if kind == "falcon" and name.startswith("prefix"):
            continue  # refused (suitability.py)
        if shape.experts and method["type"] in ("LoRA", "AdaLoRA"):
            part = "lora" if method["type"] == "LoRA" else "adaLora"
            method = method | {part: method[part] | {"targetModules": ATTENTION}}  # not the experts
        spec = finetune_spec(method=method)
        found[name], wanted[name] = counted(kind, spec), counted_by_peft(kind, spec)
    assert found == wanted


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"targetModules": ["q_proj", "v_proj"], "useDora": True}),
        ("llama", {"targetModules": [r".*\.0\..*_proj"]}),
        ("llama", {"excludeModules": ["down_proj"]}),
        ("llama", {"targetModules": ["q_proj"], "layersToTransform": [1], "rankPattern": {"q_proj": 8}}),
        ("llama", {"layersToTransform": [0]}),
        ("llama", {"modulesToSave": ["lm_head"]}),
        ("llama", {"modulesToSave": ["lm_head", "embed_tokens"]}),
        ("qwen2", {"modulesToSave": ["embed_tokens"]}),  # which is its head, too
        ("qwen2", {"modulesToSave": ["q_proj"], "bias": "All"}),
        ("gpt2", {"modulesToSave": ["wte", "c_proj"], "bias": "LoraOnly"}),
        ("gpt_neox", {"modulesToSave": ["lm_head", "embed_in"], "bias": "All"}),
        ("opt", {"modulesToSave": ["fc2"], "rankPattern": {r"layers\.0\..*": 2}}),
    ],
)
def test_options_of_lora_are_counted_as_peft_counts_them(kind: str, options: dict[str, Any]) -> None:
    spec = finetune_spec(method=lora(**options))
    assert counted(kind, spec) == counted_by_peft(kind, spec)
