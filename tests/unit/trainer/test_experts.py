"""LoRA on the experts of a mixture-of-experts model: right where PEFT can do it, refused before a GPU where it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.failures import RunFailure
from finetune_trainer.merge import combine
from finetune_trainer.mergespec import MergeSpec
from finetune_trainer.methods.experts import FUSED, NAMES, family
from finetune_trainer.methods.servable import mount_refusal
from finetune_trainer.methods.suitability import refuse_unsuitable
from finetune_trainer.results.adapter import write_adapter
from finetune_trainer.runspec import Storage

from .small_run import Setup, logits, run_spec
from .tiny import VOCABULARY, finetune_spec, make_tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(kind: str = "LoRA", **options: Any) -> dict[str, Any]:
    return {"type": kind, "lora": {"rank": 4, "alpha": 8, "dropout": 0} | options}


def refusal(method: dict[str, Any], kind: str = "mixtral") -> str:
    try:
        refuse_unsuitable(None, finetune_spec(method=method), {"model_type": kind})
    except RunFailure as failure:
        return failure.message
    return ""


@pytest.mark.parametrize(
    ("field", "method"),
    [
        ("method.lora.dropout: the experts of this mixtral model", lora(dropout=0.05)),
        ("method.lora.dropout", lora("QLoRA", dropout=0.05, targetModules=[*ATTENTION, "gate"])),
        ("method.lora.dropout", lora(dropout=0.1, targetModules=[r".*\.experts\.w[123]"])),
        ("method.lora.useDora", lora(useDora=True)),
        ("method.lora.initialization: the experts of this mixtral model are among targetModules, and EVA", lora(initialization="EVA")),
        ("method.lora.initialization", lora("QLoRA", initialization="LoftQ")),
        ("method.lora.targetModules: w1 and w3 of an expert are one tensor", lora(targetModules=["w1", "w2"])),
    ],
)  # fmt: skip
def test_what_peft_cannot_do_with_experts_is_refused_by_prepare(field: str, method: dict[str, Any]) -> None:
    assert refusal(method).startswith(field)
    assert "; " in refusal(method)
    assert not refusal(method, "llama4"), "PEFT adapts no experts of this one"


@pytest.mark.parametrize(
    "method",
    [
        lora(),
        lora("QLoRA", targetModules=["w1", "w2", "w3"]),
        lora(targetModules=ATTENTION, dropout=0.05, useDora=True, initialization="EVA"),
        lora(targetModules=[r".*\.[qkvo]_proj"], dropout=0.05),
        lora(layersToTransform=[0], dropout=0.05),
    ],
)
def test_what_works_is_not_refused(method: dict[str, Any]) -> None:
    assert not refusal(method)


def test_the_models_and_names_are_those_that_peft_converts() -> None:
    from peft.utils import transformers_weight_conversion as peft

    assert {kind: set(names) for kind, names in NAMES.items()} == {
        kind: set(names) for kind, names in peft._MOE_TARGET_MODULE_MAPPING.items()
    }
    assert {kind: [set(names)] for kind, names in FUSED.items()} == {
        kind: [set(names) for names in fused.values()] for kind, fused in peft._MOE_FUSED_TARGETS.items()
    }
    for model_type, kind in peft._MODEL_TO_CONVERSION_PATTERN.items():
        assert family({"model_type": model_type}) == (kind if kind in NAMES else ""), model_type


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
def test_adapted_experts_reload_and_merge_with_the_same_logits(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    from finetune_trainer.training.precision import choose_precision
    from finetune_trainer.training.quantization import load_base_model

    from .small_run import CPU

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    spec = finetune_spec(method=lora(kind), training={"learningRate": 0.02})
    setup = Setup(tmp_path, tmp_path / "base", spec)
    before = setup.loss()
    setup.run(4)
    assert setup.loss() < before
    written = write_adapter(setup.model, run_spec(spec), tmp_path / "adapter", setup.initial)
    assert any("experts" in name for name in setup.fit.parameters)
    assert "experts (target_parameters)" in mount_refusal(written)

    base = load_base_model(tmp_path / "base", spec, choose_precision("FP32", "cpu", False), CPU)
    reloaded = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert torch.allclose(reloaded, logits(setup.model), atol=1e-4)
    merge = MergeSpec(
        name="bot", storage=Storage(uri="s3://finetune"), base_uri="", adapter_uri="", adapter_digest="sha256:",
        precision="FP32", prompts=["alpha beta gamma one two three"],
    )  # fmt: skip
    quantization = json.loads(spec.method.quantization.model_dump_json())
    manifest = {"quantization": quantization["type"], "doubleQuant": quantization["double_quant"]}
    combine(merge, tmp_path / "base", tmp_path / "adapter", manifest, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        merged = plain.eval()(input_ids=torch.arange(5, 25)[None]).logits
    assert torch.allclose(merged, reloaded, atol=1e-4)
