"""DPO: raise the chosen answer over the rejected one, measured against the base model."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.answers import BETA, Answers, Autocast, pair_metrics, pair_sums, references
from finetune_trainer.data import Row


class DPO:
    """The sigmoid loss of Rafailov et al. 2023, equation 7: -log sigmoid(chosen - rejected), where the reward of an
    answer is beta times how much likelier it is than by the base model. Mean over the pairs of the effective batch."""

    totals: ClassVar[tuple[str, ...]] = ("pairs",)
    sums: ClassVar[tuple[str, ...]] = ("loss", "right", "margin")
    # The base model is the reference: it gives every answer the same reward.
    base: ClassVar[Mapping[str, float] | None] = {
        "loss": round(math.log(2), 6),
        "reward_accuracy": 0.5,
        "reward_margin": 0.0,
    }

    def __init__(self, spec: FineTuneSpec, layout: str, autocast: Autocast) -> None:
        self.answers, self.beta = Answers(layout, autocast), spec.objective.beta or BETA

    def total(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> tuple[float, ...]:
        return (len(rows),)

    def logprobs(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> torch.Tensor:
        with self.answers.logprobs(model, rows, device) as logprobs:
            return logprobs.view(-1, 2)

    def backward(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], scale: float, device: torch.device
    ) -> torch.Tensor:
        with self.answers.logprobs(model, rows, device) as logprobs:
            chosen, rejected = self.rewards(logprobs, rows)
            loss = -logsigmoid(chosen - rejected).sum() / totals["pairs"]
            (loss * scale).backward()
        return loss.detach()

    def measure(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], device: torch.device
    ) -> dict[str, float]:
        with self.answers.logprobs(model, rows, device) as logprobs:
            chosen, rejected = self.rewards(logprobs, rows)
        return pair_sums(-logsigmoid(chosen - rejected), chosen, rejected)

    def rewards(self, logprobs: torch.Tensor, rows: list[Row]) -> tuple[torch.Tensor, ...]:
        """Of the chosen [rows] and of the rejected answers [rows]."""
        return (self.beta * (logprobs.view(-1, 2) - references(rows, logprobs.device))).unbind(1)

    def metrics(self, sums: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
        return pair_metrics(sums, totals)
