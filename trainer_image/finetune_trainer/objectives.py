"""What is optimised, one class per objective: the weight of a row, its loss, and what is measured on held-out rows."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Protocol

import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.attention import packed
from finetune_trainer.data import IGNORE, LAYOUTS, Row
from finetune_trainer.loss import token_loss
from finetune_trainer.precision import Precision

Autocast = Callable[[], AbstractContextManager[object]]


class Objective(Protocol):
    """Losses are sums over rows: the loop divides by the weight of the whole effective batch, however it was cut."""

    counts: ClassVar[tuple[str, ...]]

    def weight(self, row: Row) -> int:
        """What the row counts in the mean."""
        ...

    def backward(self, model: torch.nn.Module, rows: list[Row], scale: float, device: torch.device) -> torch.Tensor:
        """Add the gradient of `scale` times the rows' summed loss; returns the summed loss, without a graph."""
        ...

    def measure(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> dict[str, float]:
        """Sums over the rows: weight, loss, and the `counts`."""
        ...


class SFT:
    """Imitate the labelled tokens: mean cross entropy over all target tokens of the effective batch."""

    counts: ClassVar[tuple[str, ...]] = ("token_accuracy",)

    def __init__(self, layout: str, autocast: Autocast) -> None:
        self.collate, self.autocast = LAYOUTS[layout], autocast

    def weight(self, row: Row) -> int:
        """Target tokens: the first token of a sample has nothing before it to be predicted from."""
        starts = row.lengths.cumsum() - row.lengths
        return int((row.labels != IGNORE).sum() - (row.labels[starts] != IGNORE).sum())

    def backward(self, model: torch.nn.Module, rows: list[Row], scale: float, device: torch.device) -> torch.Tensor:
        batch = self.collate(rows).to(device)
        with packed(batch):
            with self.autocast():
                result = token_loss(model, batch)
            (result.loss * scale).backward()
        return result.loss.detach()

    def measure(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> dict[str, float]:
        batch = self.collate(rows).to(device)
        with packed(batch), self.autocast():
            result = token_loss(model, batch)
        return {"weight": float(result.tokens), "loss": float(result.loss), "token_accuracy": float(result.right)}


def make_objective(spec: FineTuneSpec, layout: str, device: torch.device, precision: Precision) -> Objective:
    """The objective of `objective.type`, in a layout (data.LAYOUTS)."""

    def autocast() -> AbstractContextManager[object]:
        # Trained weights are float32 beside a base of half the size: autocast multiplies them in the base's format.
        return torch.autocast(device.type, getattr(torch, precision.compute)) if precision.autocast else nullcontext()

    return OBJECTIVES[spec.objective.type](layout, autocast)


OBJECTIVES = {"SFT": SFT}
