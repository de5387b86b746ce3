"""What the objectives that are shown a chosen and a rejected answer have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from finetune_trainer.data.batches import Row

Judged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Pairs(ABC):
    """An objective whose loss is a mean over pairs, and which gives a reward to each answer of a pair."""

    totals: ClassVar[tuple[str, ...]] = ("pairs",)
    sums: ClassVar[tuple[str, ...]] = ("loss", "right", "margin")

    @abstractmethod
    def judged(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], device: torch.device
    ) -> AbstractContextManager[Judged]:
        """Loss, reward of the chosen and reward of the rejected answer of each row; backward must run within it."""

    def total(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> tuple[float, ...]:
        return (len(rows),)

    def backward(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], scale: float, device: torch.device
    ) -> torch.Tensor:
        with self.judged(model, rows, totals, device) as (losses, _, _):
            loss = losses.sum() / totals["pairs"]
            (loss * scale).backward()
        return loss.detach()

    def measure(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], device: torch.device
    ) -> dict[str, float]:
        """A tie is half right, as guessing is."""
        with self.judged(model, rows, totals, device) as (losses, chosen, rejected):
            right = (chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()
            return {"loss": float(losses.sum()), "right": float(right), "margin": float((chosen - rejected).sum())}

    def metrics(self, sums: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
        pairs = totals["pairs"]
        names = {"loss": "loss", "reward_accuracy": "right", "reward_margin": "margin"}
        return {metric: sums[name] / pairs for metric, name in names.items()} if pairs else {}


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor) -> Judged:
    """Minus the log probability that the chosen answer is the better one, given both rewards; and these."""
    return -logsigmoid(chosen - rejected), chosen, rejected
