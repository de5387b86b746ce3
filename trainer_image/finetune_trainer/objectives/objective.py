"""What is optimised, one class per objective: what a row counts, its loss, and what is measured on held-out rows."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from math import exp
from typing import ClassVar, Protocol, runtime_checkable

import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.data.batches import IGNORE, LAYOUTS, Row
from finetune_trainer.objectives.answers import Autocast
from finetune_trainer.objectives.dpo import DPO
from finetune_trainer.objectives.kto import KTO
from finetune_trainer.objectives.loss import token_loss
from finetune_trainer.objectives.orpo import ORPO
from finetune_trainer.objectives.reward import Reward
from finetune_trainer.training.attention import packed
from finetune_trainer.training.distributed import World, summed
from finetune_trainer.training.precision import Precision


class Objective(Protocol):
    """Losses are sums over rows, divided by totals of the whole effective batch: it may be cut in any way."""

    totals: ClassVar[tuple[str, ...]]
    sums: ClassVar[tuple[str, ...]]
    # The base model's metrics where they are known without measuring: empty when they mean nothing.
    base: ClassVar[Mapping[str, float] | None]

    def total(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> tuple[float, ...]:
        """Sums over the rows, one for each name in `totals`, that losses need to know of the whole effective batch."""
        ...

    def backward(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], scale: float, device: torch.device
    ) -> torch.Tensor:
        """Add the gradient of `scale` times what the rows add to the mean loss; returns that, without a graph."""
        ...

    def measure(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], device: torch.device
    ) -> dict[str, float]:
        """Sums over the rows, one for each name in `sums`."""
        ...

    def metrics(self, sums: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
        """What is reported, and what gates are about; empty when no row was measured."""
        ...


@runtime_checkable
class Referring(Protocol):
    """An objective that compares with the base model."""

    def logprobs(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> torch.Tensor:
        """[rows, 2]: what `Row.reference` holds when the model is the base model."""
        ...


class SFT:
    """Imitate the labelled tokens: mean cross entropy over all target tokens of the effective batch."""

    totals: ClassVar[tuple[str, ...]] = ("tokens",)
    sums: ClassVar[tuple[str, ...]] = ("loss", "right")
    base: ClassVar[Mapping[str, float] | None] = None

    def __init__(self, spec: FineTuneSpec, layout: str, autocast: Autocast) -> None:
        self.collate, self.autocast = LAYOUTS[layout], autocast

    def total(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> tuple[float, ...]:
        """Target tokens: the first token of a sample has nothing before it to be predicted from."""
        count = 0
        for row in rows:
            starts = row.lengths.cumsum() - row.lengths
            count += int((row.labels != IGNORE).sum() - (row.labels[starts] != IGNORE).sum())
        return (count,)

    def backward(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], scale: float, device: torch.device
    ) -> torch.Tensor:
        batch = self.collate(rows).to(device)
        with packed(batch):
            with self.autocast():
                loss = token_loss(model, batch).loss / max(1.0, totals["tokens"])
            (loss * scale).backward()
        return loss.detach()

    def measure(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], device: torch.device
    ) -> dict[str, float]:
        batch = self.collate(rows).to(device)
        with packed(batch), self.autocast():
            result = token_loss(model, batch)
        return {"loss": float(result.loss), "right": float(result.right)}

    def metrics(self, sums: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
        tokens = totals["tokens"]
        if not tokens:
            return {}
        loss = sums["loss"] / tokens
        return {"loss": loss, "token_accuracy": sums["right"] / tokens, "perplexity": exp(min(loss, 700.0))}


def batch_totals(
    objective: Objective, model: torch.nn.Module, chunks: Iterable[list[Row]], world: World, device: torch.device
) -> dict[str, float]:
    """The totals of all rows of all processes; `chunks`: this process's rows, as they are computed at once."""
    sums = [0.0] * len(objective.totals)
    for rows in chunks:
        sums = [a + b for a, b in zip(sums, objective.total(model, rows, device), strict=True)]
    return dict(zip(objective.totals, summed(world, *sums, device=device), strict=True))


def make_objective(spec: FineTuneSpec, layout: str, device: torch.device, precision: Precision) -> Objective:
    """The objective of `objective.type`, in a layout (data.LAYOUTS)."""
    return OBJECTIVES[spec.objective.type](spec, layout, make_autocast(device, precision))


def make_autocast(device: torch.device, precision: Precision) -> Autocast:
    """Trained weights are float32 beside a base of half the size: autocast multiplies them in the base's format."""

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, getattr(torch, precision.compute)) if precision.autocast else nullcontext()

    return autocast


OBJECTIVES: dict[str, type[SFT | DPO | KTO | ORPO | Reward]] = {
    "SFT": SFT,
    "DPO": DPO,
    "KTO": KTO,
    "ORPO": ORPO,
    "Reward": Reward,
}
