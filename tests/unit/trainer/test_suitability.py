"""A method that does not suit the base model is refused from config.json, with the field and the way out."""

from typing import Any

import pytest

from finetune_trainer.failures import RunFailure
from finetune_trainer.memory.architecture import architecture
from finetune_trainer.methods.suitability import refuse_unsuitable

from .families import KNOWN
from .test_methods import METHODS, lora
from .tiny import finetune_spec


def refuse(method: dict[str, Any], kind: str = "llama", row_tokens: int = 0, **config: Any) -> None:
    config = {"model_type": kind, **KNOWN.get(kind, {}), **config}
    refuse_unsuitable(architecture(config), finetune_spec(method=method), config, row_tokens)


BAD: list[tuple[str, dict[str, Any], str]] = [
    (
        "method.lora.targetModules: c_attn names no layer of this llama model; its linear layers are q_proj, k_proj",
        lora(targetModules=["c_attn"]),
        "llama",
    ),
    ("method.adaLora.targetModules: c_fc", {"type": "AdaLoRA", "adaLora": {"targetModules": ["c_fc"]}}, "llama"),
    ("method.ia3.targetModules: c_fc names no layer", {"type": "IA3", "ia3": {"targetModules": ["c_fc"]}}, "llama"),
    (
        "method.ia3.feedforwardModules: mlp is none of targetModules",
        {"type": "IA3", "ia3": {"targetModules": [".*proj"], "feedforwardModules": ["mlp"]}},
        "llama",
    ),
    ("method.lora.excludeModules: head names no layer", lora(excludeModules=["head"]), "llama"),
    (
        "method.lora.targetModules: excludeModules and modulesToSave leave no layer",
        lora(targetModules=["q_proj"], excludeModules=["q_proj"]),
        "llama",
    ),
    (
        "method.lora.layersToTransform: 2, 7 is beyond the last layer; this model has 2, counted from 0",
        lora(layersToTransform=[1, 2, 7]),
        "llama",
    ),
    ("method.lora.rankPattern: head matches none", lora(rankPattern={"head": 8}), "llama"),
    (
        "method.lora.alphaPattern: up_proj matches none of the target layers",
        lora(targetModules=["q_proj"], alphaPattern={"up_proj": 8}),
        "llama",
    ),
    (
        "method.lora.rank: PiSSA finds at most 32 directions in model.layers.0.self_attn.k_proj, not 33",
        lora(initialization="PiSSA", rank=33),
        "llama",
    ),
    ("method.lora.rank: EVA finds at most 64", lora(initialization="EVA", rank=65), "llama"),
    (
        "method.lora.modulesToSave: head names no layer that can be trained whole; those are lm_head, embed_tokens, q_p",
        lora(modulesToSave=["value_head"]),
        "llama",
    ),
    (
        "method.lora.modulesToSave: down_proj is quantized in the base model and cannot be trained whole",
        lora("QLoRA", modulesToSave=["down_proj"]),
        "llama",
    ),
    ("method.lora.initialization: PEFT's OLoRA does not fit GPT-2's", lora(initialization="OLoRA"), "gpt2"),
    ("method.type: PEFT's PrefixTuning does not fit falcon's", {"type": "PrefixTuning"}, "falcon"),
    ("method.ia3.targetModules: model type 'rwkv' has no default here", {"type": "IA3"}, "rwkv"),
]


@pytest.mark.parametrize(("message", "method", "kind"), BAD, ids=[message.split(";")[0] for message, _, _ in BAD])
def test_what_does_not_suit_the_model_is_refused(message: str, method: dict[str, Any], kind: str) -> None:
    with pytest.raises(RunFailure) as failure:
        refuse(method, kind)
    assert failure.value.reason == "UnsupportedCombination"
    assert message.replace("value_head", "head") in failure.value.message.replace("value_head", "head")
    assert ";" in failure.value.message


def test_virtual_tokens_and_the_longest_row_fit_the_positions() -> None:
    method = {"type": "PromptTuning", "virtualTokens": {"count": 4}}
    refuse(method, "gpt2", row_tokens=28)
    with pytest.raises(RunFailure, match="lower training.maxLength to 28 or less"):
        refuse(method, "gpt2", row_tokens=29)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_is_trained_in_tests_suits_the_model(name: str) -> None:
    refuse(METHODS[name])
