"""What is kept for the backward pass, and what is needed at most, is what the estimate says, for every kind of block."""

import pytest

from bench import memory

# These keep what another one keeps: `python -m bench.memory` measures them too.
ALIKE = {"mistral", "granite", "smollm3", "qwen2", "olmo", "olmo3", "gemma", "helium", "glm", "cohere2", "ernie4_5",
         "gptj", "granitemoe"}  # fmt: skip
METHODS = [method for method in memory.METHODS if method != "LoRA"]
CASES = [
    *((family, "LoRA", "BF16", False) for family in memory.FAMILIES if family not in ALIKE),
    *(("llama", method, "BF16", False) for method in METHODS),
    *((family, "LoRA", "FP32", False) for family in ("llama", "gpt2", "gemma2")),
    *((family, "LoRA", "BF16", True) for family in ("llama", "gpt2", "gemma3_text", "gemma2", "mixtral", "gpt_oss")),
]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    memory.quiet()


@pytest.mark.parametrize(("family", "method", "precision", "checkpointing"), CASES)
def test_activations_and_the_peak_are_what_is_counted(
    family: str, method: str, precision: str, checkpointing: bool
) -> None:
    spec, config = memory.finetune(family, method, precision), memory.model_config(family)
    measured = memory.measure(config, spec, memory.TOKENS, checkpointing)
    kept, peak = memory.estimated(config, spec, memory.TOKENS, checkpointing)
    if not checkpointing:
        assert kept == pytest.approx(measured.kept, rel=memory.TOLERANCE)
    assert peak == pytest.approx(measured.peak, rel=0.15)
