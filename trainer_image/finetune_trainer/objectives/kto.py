"""KTO: raise good answers and lower bad ones, each judged alone, as far as they are from the base model on average."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.data.batches import Row
from finetune_trainer.objectives.answers import BETA, Answers, Autocast, references


class KTO:
    """Ethayarajh et al. 2024, equation 8: 1 - sigmoid(beta (ratio - z)) of a good answer, 1 - sigmoid(beta (z - ratio))
    of a bad one, where a ratio is the log probability over that of the base model; each times the weight of its kind.

    z, never below 0, estimates how far the model is from the base: the mean ratio of answers to prompts that they do
    not belong to, over the effective batch, without a gradient.
    """

    totals: ClassVar[tuple[str, ...]] = ("answers", "good", "mismatched")
    sums: ClassVar[tuple[str, ...]] = ("loss", "right", "good", "bad")
    # The base model is the reference: it gives every answer the same reward.
    base: ClassVar[Mapping[str, float] | None] = {"loss": 0.5, "reward_accuracy": 0.5, "reward_margin": 0.0}

    def __init__(self, spec: FineTuneSpec, layout: str, autocast: Autocast) -> None:
        objective = spec.objective
        self.answers, self.beta = Answers(layout, autocast), objective.beta or BETA
        self.good, self.bad = objective.desirable_weight or 1.0, objective.undesirable_weight or 1.0

    @torch.no_grad()
    def total(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> tuple[float, ...]:
        with self.answers.logprobs(model, mismatched(rows), device) as logprobs:
            ratios = logprobs - references(rows, device)[:, 1]
        return len(rows), sum(row.good for row in rows), float(ratios.sum())

    def logprobs(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> torch.Tensor:
        with self.answers.logprobs(model, [*rows, *mismatched(rows)], device) as logprobs:
            return logprobs.view(2, -1).T

    def backward(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], scale: float, device: torch.device
    ) -> torch.Tensor:
        with self.answers.logprobs(model, rows, device) as logprobs:
            loss = self.losses(self.gains(logprobs, rows, totals), rows).sum() / totals["answers"]
            (loss * scale).backward()
        return loss.detach()

    def measure(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], device: torch.device
    ) -> dict[str, float]:
        with self.answers.logprobs(model, rows, device) as logprobs:
            gains = self.gains(logprobs, rows, totals)
            rewards = self.beta * (logprobs - references(rows, device)[:, 0])
        good = good_ones(rows, device)
        return {
            "loss": float(self.losses(gains, rows).sum()),
            "right": float((gains > 0).sum() + 0.5 * (gains == 0).sum()),
            "good": float(rewards[good].sum()),
            "bad": float(rewards[~good].sum()),
        }

    def gains(self, logprobs: torch.Tensor, rows: list[Row], totals: Mapping[str, float]) -> torch.Tensor:
        """How far each answer is on its right side of z, times beta."""
        z = max(0.0, totals["mismatched"] / totals["answers"])
        gains = self.beta * (logprobs - references(rows, logprobs.device)[:, 0] - z)
        return torch.where(good_ones(rows, logprobs.device), gains, -gains)

    def losses(self, gains: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        weights = torch.where(good_ones(rows, gains.device), self.good, self.bad)
        return weights * (1 - torch.sigmoid(gains))

    def metrics(self, sums: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
        """The loss is the weighted mean here, so that it can be compared with the base model's, whatever the weights."""
        good, bad = totals["good"], totals["answers"] - totals["good"]
        if not good + bad:
            return {}
        found = {
            "loss": sums["loss"] / (self.good * good + self.bad * bad),
            "reward_accuracy": sums["right"] / (good + bad),
        }
        if good and bad:
            found["reward_margin"] = sums["good"] / good - sums["bad"] / bad
        return found


def mismatched(rows: list[Row]) -> list[Row]:
    """The rows' prompts with answers that do not belong to them."""
    return [row.mismatched for row in rows if row.mismatched is not None]


def good_ones(rows: list[Row], device: torch.device) -> torch.Tensor:
    return torch.tensor([row.good for row in rows], device=device)
