"""Every architecture that a GGUF file is made of, as a tiny model in transformers and in llama.cpp: the same logits."""

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.failures import RunFailure
from finetune_trainer.results.gguffile import architectures, verify, writer

from .tiny import VOCABULARY, make_tokenizer

PROMPTS = ["alpha beta gamma delta epsilon zeta one two three four five alpha beta", "x y z 1 2 3 theta iota"]
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY + 5, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PECULIAR: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"head_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7},
    "phi3": {"sliding_window": None},
    "granite": {
        "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1, "logits_scaling": 3.0,
    },
    "smollm3": {"num_hidden_layers": 5},  # the fourth has no rotary embedding
}  # fmt: skip


def make(folder: Path, model_type: str, dtype: str = "float32", **options: Any) -> tuple[dict[str, Any], Any]:
    """A model with random weights in `folder`; its configuration and itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, **PECULIAR.get(model_type, {}), **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # far from what a model starts with, so that whatever is put in the wrong place is seen
        for name, weight in model.named_parameters():
            ones = "norm" in name and not model_type.startswith("gemma")
            weight.copy_(0.3 * torch.randn_like(weight) + float(ones))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder).to_dict(), model


def agreement(folder: Path, config: dict[str, Any], model: Any, dtype: str = "float32") -> verify.Agreement:
    assert architectures.refusal(config) == ""
    writer.write(folder, config, dtype, "tiny", folder / "tiny.gguf")
    return verify.verified(folder / "tiny.gguf", load_tokenizer(folder), model, dtype, PROMPTS)


@pytest.mark.parametrize("model_type", architectures.ARCHITECTURES)
def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, model_type: str) -> None:
    config, model = make(tmp_path, model_type)
    assert agreement(tmp_path, config, model).logits < 0.001


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: str(scaling["rope_type"]))
def test_a_scaled_rotary_embedding_is_the_same(tmp_path: Path, scaling: dict[str, Any]) -> None:
    config, model = make(tmp_path, "llama", rope_parameters=scaling)
    assert agreement(tmp_path, config, model).logits < 0.001


@pytest.mark.parametrize("original", [8, 256], ids=["longer", "within"])
def test_phi_3s_rotary_embedding_is_the_same_within_its_original_length_and_beyond(
    tmp_path: Path, original: int
) -> None:
    """llama.cpp decides by the length of its context, which is a multiple of 256."""
    scaling = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + i / 10 for i in range(6)], "long_factor": [2.0 + i for i in range(6)],
        "original_max_position_embeddings": original,
    }  # fmt: skip
    config, model = make(tmp_path, "phi3", rope_parameters=scaling, original_max_position_embeddings=original)
    assert agreement(tmp_path, config, model).logits < 0.001


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_file_has_the_type_of_the_merged_weights(tmp_path: Path, dtype: str) -> None:
    config, model = make(tmp_path, "llama", dtype)
    found = agreement(tmp_path, config, model, dtype)
    assert found.logits < found.tolerance
    assert (tmp_path / "tiny.gguf").stat().st_size < 1.3 * (tmp_path / "model.safetensors").stat().st_size


def test_a_file_with_other_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q and k in transformers' order: it loads, and answers nonsense."""
    config, model = make(tmp_path, "llama")
    kind = architectures.ARCHITECTURES["llama"]
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama", architectures.Architecture(kind.arch))
    with pytest.raises(RunFailure, match=r"logits differ by .* more than 0.005 in float32"):
        agreement(tmp_path, config, model)


def test_a_file_that_llama_cpp_does_not_load_is_refused(tmp_path: Path) -> None:
    config, model = make(tmp_path, "llama")
    writer.write(tmp_path, config, "float32", "tiny", tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[:-100_000])
    with pytest.raises(RunFailure, match="llama.cpp does not load the GGUF file"):
        verify.verified(tmp_path / "tiny.gguf", load_tokenizer(tmp_path), model, "float32", PROMPTS)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt_oss"}, "not made of model type 'gpt_oss', only of llama, mistral"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope scaling 'dynamic'",
        ),
    ],
)
def test_a_model_that_is_not_in_the_table_is_refused_with_what_to_do(config: dict[str, Any], said: str) -> None:
    refusal = architectures.refusal(config)
    assert said in refusal and "convert_hf_to_gguf.py" in refusal


def test_the_context_ends_where_the_sliding_window_begins() -> None:
    config = {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}
    assert architectures.context(config) == 4096
    assert architectures.context({**config, "sliding_window": None}) == 32768
    assert architectures.context({**config, "model_type": "qwen2", "use_sliding_window": False}) == 32768
