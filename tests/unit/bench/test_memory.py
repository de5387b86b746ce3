"""What is kept for the backward pass, and what is needed at most, is what the estimate says, for every family of models."""

import pytest

from bench import memory

MORE = [
    ("llama", method, "BF16") for method in memory.METHODS if method != "LoRA"
] + [("llama", "LoRA", "FP32"), ("gpt2", "LoRA", "FP32"), ("gemma2", "LoRA", "FP32")]  # fmt: skip
CASES = [(family, "LoRA", "BF16") for family in memory.FAMILIES] + MORE


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    memory.quiet()


@pytest.mark.parametrize(("family", "method", "precision"), CASES)
def test_activations_are_what_is_kept_and_the_peak_is_what_was_counted(
    family: str, method: str, precision: str
) -> None:
    kept, peak, checkpointed, _ = memory.ratios(family, method, precision, memory.TOKENS)
    assert kept == pytest.approx(1, abs=memory.TOLERANCE)
    assert peak == pytest.approx(1, abs=0.15)
    assert checkpointed == pytest.approx(1, abs=0.3)


def test_logits_are_what_a_large_vocabulary_needs() -> None:
    spec = memory.finetune("llama", "LoRA", "BF16")
    config = memory.model_config("llama") | {"vocab_size": 16384, "num_hidden_layers": 1}
    kept, peak = memory.estimated(config, spec, memory.TOKENS, False)
    assert peak > 3 * kept
    assert memory.measure(config, spec, memory.TOKENS, False).peak == pytest.approx(peak, rel=0.1)
