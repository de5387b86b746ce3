"""Proof that a loaded adapter changes what the engine answers.

vLLM can load an adapter with "200 OK" and go on serving the base model (vllm#34186, #34591, #48019: target modules
that it does not know are skipped). So base and adapter continue the same texts, and what they expect must differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_serving.engine import Engine
from finetune_serving.routes import BASE

#: Places in each prompt at which the next token is compared.
PLACES = 6
#: The effect must stand out of what the base model differs from itself by, asked twice on a busy GPU.
NOISE_FACTOR = 3.0


@dataclass(frozen=True)
class Effect:
    """On one prompt. `delta`: mean difference of log probabilities between adapter and base model; `noise`: the same
    between two answers of one of them, the larger."""

    delta: float
    noise: float

    @property
    def clear(self) -> bool:
        """Whether the difference, or that there is none, is more than the engine's noise."""
        return self.delta >= NOISE_FACTOR * self.noise

    def refusal(self, min_delta: float) -> tuple[str, str] | None:
        """(reason, message) when the adapter does not prove itself; a `min_delta` of 0 asks for no proof."""
        if min_delta == 0:
            return None
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
        if not self.clear:
            return "NoEffect", (
                f"log probabilities differ from the base model's by {self.delta:.2g}, which is not above the engine's "
                f"own noise {self.noise:.2g}: set spec.probe.prompts to prompts that this adapter was trained on"
            )
        return None


async def measure(engine: Engine, model: str, prompts: Sequence[str]) -> Effect:
    """The effect on the prompt that shows it best: one that the engine answers differently each time proves nothing."""
    effects = [await measure_on(engine, model, prompt) for prompt in prompts]
    return max(effects, key=lambda effect: (effect.clear, effect.delta))


async def measure_on(engine: Engine, model: str, prompt: str) -> Effect:
    """Has the prompt continued by the base model and by the adapter, twice each in turn."""
    texts = beginnings(prompt)
    base, tuned, base_again, tuned_again = [
        await engine.next_logprobs(asked, texts) for asked in (BASE, model, BASE, model)
    ]
    noise = max(mean_difference(base, base_again), mean_difference(tuned, tuned_again))
    return Effect(mean_difference(base, tuned), noise)


def beginnings(prompt: str) -> list[str]:
    """The prompt, and it cut after some of its words: several places to compare at in one request."""
    words = prompt.split(" ")
    counts = {max(1, round(len(words) * place / PLACES)) for place in range(1, PLACES + 1)}
    return [" ".join(words[:count]) for count in sorted(counts)]


def mean_difference(left: Sequence[Mapping[str, float]], right: Sequence[Mapping[str, float]]) -> float:
    """Mean over all places and over the left's likeliest tokens of the absolute difference in log probability."""
    differences = [
        # A token that is not among the right's likeliest is at most as likely as the last of those.
        abs(logprob - there.get(token, min(there.values())))
        for here, there in zip(left, right, strict=True)
        for token, logprob in here.items()
    ]
    return sum(differences) / len(differences) if differences else 0.0
