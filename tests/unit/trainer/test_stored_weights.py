"""A base model takes the bytes that the estimate says: quantized by bitsandbytes, with its constants, and what it leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.memory import model_config
from finetune_trainer.memory.architecture import architecture
from finetune_trainer.memory.estimate import Workload, estimate
from finetune_trainer.training.precision import choose_precision
from finetune_trainer.training.quantization import load_base_model

from .tiny import finetune_spec

NF4 = {"type": "NF4"}
FP4 = {"type": "FP4", "doubleQuant": False}
INT8 = {"type": "INT8"}
STORED: list[tuple[str, dict[str, Any]]] = [
    ("llama", NF4),
    ("llama", FP4),
    ("llama", INT8),
    ("qwen2", NF4 | {"tied": True}),
    ("gpt2", NF4),  # whose layers are no nn.Linear
    ("falcon", NF4),  # nor these
    ("phi", INT8),  # a head with a bias
    ("mixtral", NF4),  # experts stay as they are
    ("qwen2_moe", INT8),  # but for the shared one
    ("gemma2", {"type": "None"}),
]


@pytest.mark.parametrize(("family", "quantization"), STORED, ids=[f"{family}-{q['type']}" for family, q in STORED])
def test_weights_take_what_the_estimate_says(family: str, quantization: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tied = {"tie_word_embeddings": True} if quantization.get("tied") else {}
    config = AutoConfig.for_model(**model_config(family), **tied)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    asked = {name: value for name, value in quantization.items() if name != "tied"}
    kind = "QLoRA" if asked["type"] in ("NF4", "FP4") else "LoRA"
    spec = finetune_spec(
        method={"type": kind, "quantization": asked}, training={"precision": "BF16"}, resources={"gpus": 1}
    )
    model = load_base_model(tmp_path, spec, choose_precision("BF16", "cpu", True), torch.device("cpu"))
    shape = architecture(config.to_dict())
    assert shape
    part = estimate(shape, Workload(spec, 64), 1, False).parts[0]
    assert stored(model) == pytest.approx(part.expected, rel=1e-3)


def stored(model: torch.nn.Module) -> int:
    """Bytes of all parameters and of what bitsandbytes keeps beside them, but for its code books of some hundred bytes."""
    tensors = []
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        tensors += [parameter.data, getattr(parameter, "SCB", None)]
        if state is not None:
            tensors += [state.absmax, state.state2.absmax if state.nested else None]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor is not None
    }
    return sum(storage.nbytes() for storage in storages.values())
