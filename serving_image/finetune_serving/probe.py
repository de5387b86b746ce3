"""Proof that a loaded adapter changes what the engine answers.

vLLM can load an adapter with "200 OK" and go on serving the base model (vllm#34186, #34591, #48019: target modules
that it does not know are skipped). So base and adapter score the same prompts, and the log probabilities must differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_serving.engine import Engine
from finetune_serving.routes import BASE

DEFAULT_PROMPTS = (
    "Hello! How can I help you today?",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "User: What is your name?\nAssistant: My name is",
    "def add(a, b):\n    return a + b\n",
)
MAX_PROMPTS = 8
#: The effect must stand out of what the base model differs from itself by, asked twice on a busy GPU.
NOISE_FACTOR = 3.0


@dataclass(frozen=True)
class Effect:
    """`delta`: the largest mean difference of a prompt; `noise`: the same between two answers of the base model."""

    delta: float
    noise: float
    tokens: int

    def refusal(self, min_delta: float) -> tuple[str, str] | None:
        """(reason, message) when the adapter does not prove itself; a `min_delta` of 0 asks for no proof."""
        if min_delta == 0:
            return None
        if self.tokens == 0:
            return (
                "ProbeImpossible",
                "no probe prompt has two tokens or more: set spec.probe.prompts to whole sentences",
            )
        if self.delta == 0:
            return "NoEffect", (
                "the engine answers exactly like the base model with this adapter: it was loaded but is not applied "
                "(target modules the engine does not know, or an untrained adapter); use mode: Merge or train again"
            )
        if self.delta < min_delta:
            return "NoEffect", (
                f"log probabilities differ from the base model's by {self.delta:.2g}, less than "
                f"spec.probe.minLogprobDelta {min_delta:.2g}: train longer, or set spec.probe.prompts to the kind of "
                "prompts that this adapter was trained on"
            )
        if self.delta < NOISE_FACTOR * self.noise:
            return "NoEffect", (
                f"log probabilities differ from the base model's by {self.delta:.2g}, which is not above the engine's "
                f"own noise {self.noise:.2g}: set spec.probe.prompts to prompts that this adapter was trained on"
            )
        return None


async def measure(engine: Engine, model: str, prompts: Sequence[str]) -> Effect:
    """Scores every prompt with the base model, the adapter and the base model again."""
    delta, noise, tokens = 0.0, 0.0, 0
    for prompt in prompts:
        base = await engine.prompt_logprobs(BASE, prompt)
        tuned = await engine.prompt_logprobs(model, prompt)
        again = await engine.prompt_logprobs(BASE, prompt)
        tokens += len(tuned)
        delta = max(delta, mean_difference(base, tuned))
        noise = max(noise, mean_difference(base, again))
    return Effect(delta, noise, tokens)


def mean_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Mean absolute difference per token; 0 when there is nothing to compare."""
    if len(left) != len(right):
        raise ValueError(f"the same prompt has {len(left)} and {len(right)} tokens")
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left) if left else 0.0


def prompts_for(asked: Sequence[str], recorded: Sequence[str]) -> tuple[str, ...]:
    """The spec's prompts; else the fixed ones and those that training recorded in the adapter's manifest."""
    return tuple(asked)[:MAX_PROMPTS] if asked else (*recorded, *DEFAULT_PROMPTS)[:MAX_PROMPTS]
