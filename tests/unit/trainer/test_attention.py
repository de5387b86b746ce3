"""Packed samples never see each other: on every model, attention and quantization that we train."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_trainer.data.batches import Row, flat, padded
from finetune_trainer.objectives.loss import logits_of
from finetune_trainer.training import attention
from finetune_trainer.training.layout import choose_layout, isolation
from finetune_trainer.training.precision import choose_precision
from finetune_trainer.training.quantization import load_base_model

from .tiny import VOCABULARY, finetune_spec

LENGTHS = (7, 1, 12, 4)
CPU = torch.device("cpu")


def a_row() -> Row:
    ids = np.random.default_rng(3).integers(3, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    return Row(ids, ids, np.array(LENGTHS, np.int32))


def small(family: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**shape | options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Mistral", {"sliding_window": 5}),
        ("Gemma", {"head_dim": 16}),
    ],
)
def test_packed_logits_equal_separate_logits(family: str, options: dict[str, Any]) -> None:
    model, row = small(family, **options), a_row()
    alone = logits_of(model, padded([row]))
    attention.register()
    model.set_attn_implementation(attention.NAME)
    together = logits_of(model, flat([row]))
    assert torch.allclose(together, alone, atol=2e-5), (together - alone).abs().max()


def test_a_changed_sample_leaves_the_logits_of_its_neighbours_alone() -> None:
    model, row = small("Llama"), a_row()
    attention.register()
    model.set_attn_implementation(attention.NAME)
    before = logits_of(model, flat([row]))
    changed = row.input_ids.copy()
    changed[: LENGTHS[0]] = 5
    after = logits_of(model, flat([row._replace(input_ids=changed)]))
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])


@pytest.mark.parametrize("quantization", ["NF4", "FP4", "INT8"])
def test_a_quantized_model_is_trained_padding_free(tiny_llama: Path, quantization: str) -> None:
    method = {"type": "LoRA" if quantization == "INT8" else "QLoRA", "quantization": {"type": quantization}}
    spec = finetune_spec(method=method)
    model = load_base_model(tiny_llama, spec, choose_precision("FP32", "cpu", False), CPU)
    assert choose_layout(model, spec) == "flat"


def test_a_model_with_soft_capped_attention_falls_back_to_padding() -> None:
    model = small("Gemma2", head_dim=16, attn_logit_softcapping=5.0, sliding_window=64)
    assert choose_layout(model, finetune_spec()) == "padded"
    assert model.config._attn_implementation != attention.NAME


def test_a_recurrent_model_falls_back_to_padding() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1))
    assert choose_layout(model, finetune_spec()) == "padded"


def test_isolation_notices_an_attention_that_looks_across_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("Llama")
    attention.register()
    whole = attention.attend

    def leaking(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(attention, "_lengths", (sum(attention.lengths_now()),))
        return whole(*arguments, **options)

    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, leaking)
    try:
        assert isolation(model, "sdpa") > 0.01
    finally:
        attention.register()
