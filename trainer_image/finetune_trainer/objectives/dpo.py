"""DPO: raise the chosen answer over the rejected one, measured against the base model."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.data.batches import Row
from finetune_trainer.objectives.answers import BETA, Answers, Autocast, references
from finetune_trainer.objectives.pairs import Judged, Pairs, bradley_terry


class DPO(Pairs):
    """The sigmoid loss of Rafailov et al. 2023, equation 7: -log sigmoid(chosen - rejected), where the reward of an
    answer is beta times how much likelier it is than by the base model. Mean over the pairs of the effective batch."""

    # The base model is the reference: it gives every answer the same reward.
    base: ClassVar[Mapping[str, float] | None] = {
        "loss": round(math.log(2), 6),
        "reward_accuracy": 0.5,
        "reward_margin": 0.0,
    }

    def __init__(self, spec: FineTuneSpec, layout: str, autocast: Autocast) -> None:
        self.answers, self.beta = Answers(layout, autocast), spec.objective.beta or BETA

    def logprobs(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> torch.Tensor:
        with self.answers.logprobs(model, rows, device) as logprobs:
            return logprobs.view(-1, 2)

    @contextmanager
    def judged(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], device: torch.device
    ) -> Iterator[Judged]:
        with self.answers.logprobs(model, rows, device) as logprobs:
            chosen, rejected = (self.beta * (logprobs.view(-1, 2) - references(rows, device))).unbind(1)
            yield bradley_terry(chosen, rejected)
