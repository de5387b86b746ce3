"""The memory estimate: published shapes and counts, transformers' own counts, and verdicts."""

from typing import Any

import pytest

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.memory.architecture import Architecture, architecture
from finetune_trainer.memory.estimate import GIB, Workload, estimate, quantity
from finetune_trainer.memory.verdict import verdict

from .tiny import finetune_spec

LLAMA = {"model_type": "llama", "head_dim": None, "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Llama-2-7B": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "Llama-2-13B": LLAMA | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "vocab_size": 32000,
    },
    "Llama-3.1-70B": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Mistral-7B": LLAMA | {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "notes-100M": LLAMA | {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 8192,
    },
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def shape(name: str) -> Architecture:
    found = architecture(CONFIGS[name])
    assert found
    return found


def spec(method: str = "QLoRA", rank: int = 16, targets: list[str] | None = None, **parts: Any) -> FineTuneSpec:
    lora = {"rank": rank, "targetModules": targets or ["all-linear"], **parts.pop("lora", {})}
    parts["method"] = {"type": method, "lora": lora}
    data = finetune_spec(
        resources={"gpus": 1}, training={"precision": "BF16", "maxLength": 1024, "batchSize": 16}
    ).model_dump(by_alias=True, exclude_none=True)
    data.pop("method")
    for name, value in parts.items():
        data[name] = {**data.get(name, {}), **value}
    return FineTuneSpec.model_validate(data)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-2-13B", 13_015_864_320),
        ("Llama-3.1-70B", 70_553_706_496),
        ("Mistral-7B", 7_241_732_096),
    ],
)
def test_parameter_counts_are_the_published_ones(model: str, count: int) -> None:
    assert shape(model).parameters == count


def test_nf4_weights_are_what_bitsandbytes_allocates() -> None:
    weights = estimate(shape("notes-100M"), Workload(spec(), 1024), 1, False).parts[0]
    assert weights.expected == 69_019_392  # measured, with double quantization


def band(model: str, method: str) -> tuple[float, float]:
    """GB (decimal, as published figures are) for r=16 on q, k, v, o and one row of 512 tokens."""
    found = estimate(shape(model), Workload(spec(method, targets=ATTENTION), 512), 1, checkpointing=True)
    return found.low / 1e9, found.high / 1e9


@pytest.mark.parametrize(("model", "method", "published"), [("Llama-3.1-8B", "LoRA", 18), ("Llama-2-7B", "QLoRA", 5)])
def test_published_figures_lie_in_the_band(model: str, method: str, published: float) -> None:
    low, high = band(model, method)
    assert low <= published <= high


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("Llama-3.1-8B", 6),  # its weights take 5.7 GB, the CUDA context 0.4 or more
        ("Llama-2-7B", 4),  # its weights take 3.9 GB
        ("Llama-3.1-70B", 24),  # its weights take 39.5 GB
    ],
)
def test_published_figures_below_the_weights_themselves_are_not_believed(model: str, published: float) -> None:
    assert band(model, "QLoRA")[0] > published


def test_a_pair_is_two_texts_and_the_reference_costs_nothing() -> None:
    from finetune_trainer.memory.estimate import longest_row

    def sizes(objective: str) -> dict[str, float]:
        asked = spec("LoRA", 16, ATTENTION, objective={"type": objective})
        work = Workload(asked, longest_row(asked))
        found = estimate(shape("Llama-3.1-8B"), work, 1, checkpointing=False)
        return {part.name: part.expected for part in found.parts} | {"trained": found.trainable}

    sft, dpo, kto, reward = (sizes(name) for name in ("SFT", "DPO", "KTO", "Reward"))
    assert dpo["activations"] == 2 * sft["activations"] and kto["activations"] == sft["activations"]
    assert dpo["weights"] == sft["weights"] and dpo["reference model"] == kto["reference model"] == 0
    assert reward["logits"] == 0 and reward["trained"] == 13_631_488 + 4096


def test_a_length_that_would_fit_is_that_of_one_text_of_a_pair() -> None:
    from finetune_trainer.memory.estimate import longest_row

    texts = {}
    for objective in ("SFT", "DPO"):
        asked = spec(
            "QLoRA", 16, objective={"type": objective}, resources={"gpuMemory": "16Gi"}, training={"maxLength": 32768}
        )
        texts[objective] = verdict(shape("Llama-3.1-8B"), Workload(asked, longest_row(asked))).message
    lengths = {name: int(text.partition("training.maxLength: ")[2].partition(",")[0]) for name, text in texts.items()}
    assert lengths["DPO"] * 2 == lengths["SFT"], texts


def test_every_part_has_a_source_and_the_band_is_in_order() -> None:
    found = estimate(shape("Llama-3.1-8B"), Workload(spec(), 1024), 2, checkpointing=False)
    assert all(part.source and part.low <= part.expected <= part.high for part in found.parts)
    assert found.low < found.expected < found.high


def test_an_architecture_that_is_not_known_is_not_guessed() -> None:
    assert architecture({"model_type": "rwkv"}) is None
    assert architecture(CONFIGS["Mistral-7B"] | {"num_local_experts": 8}) is None
    assert architecture(CONFIGS["Mistral-7B"] | {"model_type": "mixtral"}) is None


@pytest.mark.parametrize(("text", "value"), [("24Gi", 24 * GIB), ("500M", 5e8), ("1.5G", 1.5e9), ("16", 16.0)])
def test_quantities_are_read_as_kubernetes_reads_them(text: str, value: float) -> None:
    assert quantity(text) == value


def test_nothing_is_kept_of_blocks_before_the_first_trained_one() -> None:
    def activations(**lora: Any) -> float:
        asked = spec("LoRA", 16, ATTENTION, lora=lora)
        parts = estimate(shape("Llama-3.1-8B"), Workload(asked, 512), 1, checkpointing=False).parts
        return next(part.expected for part in parts if part.name == "activations")

    assert activations(layersToTransform=[31]) == pytest.approx(activations() / 32)
    assert activations(layersToTransform=[24, 31]) < activations() / 4
    assert activations(layersToTransform=[31], modulesToSave=["embed_tokens"]) > activations() / 2


@pytest.mark.parametrize(
    ("kind", "published", "count"),
    [
        ("gemma3_text", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}, 3_880_263_168),
        ("gpt2", {"n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024, "vocab_size": 50257}, 1_557_611_200),
        ("gemma2", {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
                    "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000}, 9_241_705_984),
        ("phi3", {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32064}, 3_821_079_552),
        ("qwen2", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "vocab_size": 152064}, 7_615_616_512),
        ("falcon", {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "multi_query": True,
                    "parallel_attn": True, "vocab_size": 65024, "bias": False}, 6_921_720_704),
    ],
)  # fmt: skip
def test_what_a_published_config_leaves_out_is_known(kind: str, published: dict[str, Any], count: int) -> None:
    found = architecture({"model_type": kind, **published})
    assert found
    assert found.parameters == count


def test_attention_that_keeps_scores_costs_the_square_of_a_row() -> None:
    gemma = {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000}  # fmt: skip
    found = architecture(gemma)
    assert found
    scores = found.kept(2, 4096) - found.kept(2, 0)
    assert scores == 16 * 4096 * 8  # heads, keys, and float32 softmax, its copy, and tanh before and after
