"""Combinations that cannot be trained are refused with the field and the way out, before anything is downloaded."""

import subprocess
import sys
from typing import Any

import pytest

from finetune_trainer.methods.combinations import RULES, refusals

from .tiny import finetune_spec

BAD: list[tuple[str, dict[str, Any]]] = [
    ("method.quantization.type", {"method": {"type": "QLoRA", "quantization": {"type": "INT8"}}}),
    ("method.lora.initialization", {"method": {"type": "QLoRA", "lora": {"initialization": "PiSSA"}}}),
    ("method.lora.initialization", {"method": {"type": "LoRA", "lora": {"initialization": "LoftQ"}}}),
    ("method.lora.useDora", {"method": {"type": "LoRA", "lora": {"initialization": "OLoRA", "useDora": True}}}),
    (
        "method.lora.rankPattern",
        {"method": {"type": "LoRA", "lora": {"initialization": "EVA", "rankPattern": {"q_proj": 8}}}},
    ),
    ("method.lora.useDora", {"method": {"type": "LoRA", "lora": {"useDora": True}, "quantization": {"type": "INT8"}}}),
    (
        "method.lora.layersToTransform",
        {"method": {"type": "LoRA", "lora": {"targetModules": [".*q_proj"], "layersToTransform": [0]}}},
    ),
    (
        "training.gradientCheckpointing",
        {"method": {"type": "PrefixTuning"}, "training": {"gradientCheckpointing": "Enabled"}},
    ),
    ("objective.type", {"method": {"type": "PTuning"}, "objective": {"type": "DPO"}}),
    (
        "method.lora.initialization",
        {"method": {"type": "LoRA", "lora": {"initialization": "EVA"}}, "objective": {"type": "Reward"}},
    ),
]


@pytest.mark.parametrize(("field", "parts"), BAD)
def test_a_bad_combination_is_refused_by_its_field(field: str, parts: dict[str, Any]) -> None:
    messages = list(refusals(finetune_spec(**parts)))
    assert len(messages) == 1
    assert messages[0].startswith(field)


@pytest.mark.parametrize(
    "method",
    [
        {"type": "QLoRA"},
        {"type": "LoRA", "lora": {"initialization": "PiSSA", "rankPattern": {"q_proj": 8}}},
        {"type": "LoRA", "lora": {"bias": "All"}},
        {"type": "QLoRA", "lora": {"initialization": "LoftQ"}},
        {"type": "QLoRA", "lora": {"useDora": True, "useRslora": True}},
        {"type": "IA3", "quantization": {"type": "NF4"}},
        {"type": "PromptTuning"},
    ],
)
def test_what_works_is_not_refused(method: dict[str, Any]) -> None:
    assert list(refusals(finetune_spec(method=method))) == []


def test_every_rule_names_a_field_and_a_way_out() -> None:
    for rule in RULES:
        assert rule.message.split(":")[0].startswith(("method.", "objective.", "training."))
        assert ";" in rule.message


def test_the_rules_need_no_torch() -> None:
    code = "import sys, finetune_trainer.methods.combinations, finetune_trainer.evaluation.gates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
