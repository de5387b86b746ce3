"""ORPO: imitate the chosen answer and lower the odds of the rejected one, in one pass and without a reference."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.data.batches import LAYOUTS, Row
from finetune_trainer.objectives.answers import BETA, Autocast, answer_lengths, token_logprobs
from finetune_trainer.objectives.pairs import Judged, Pairs
from finetune_trainer.training.attention import packed


class ORPO(Pairs):
    """Hong et al. 2024, equation 6: cross entropy of the chosen text plus beta times -log sigmoid(log odds ratio).

    As in TRL the cross entropy is that of all tokens of prompt and chosen answer, and the odds are those of the mean
    log probability of an answer's tokens, which is also (times beta) its reward.
    """

    totals: ClassVar[tuple[str, ...]] = ("pairs", "tokens")
    base: ClassVar[Mapping[str, float] | None] = None

    def __init__(self, spec: FineTuneSpec, layout: str, autocast: Autocast) -> None:
        self.collate, self.autocast, self.beta = LAYOUTS[layout], autocast, spec.objective.beta or BETA

    def total(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> tuple[float, ...]:
        return len(rows), float(sum(int(row.lengths[0]) - 1 for row in rows))

    @contextmanager
    def judged(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], device: torch.device
    ) -> Iterator[Judged]:
        whole = [with_prompt(row) for row in rows]
        batch = self.collate(whole).to(device)
        with packed(batch):
            with self.autocast():
                tokens = token_logprobs(model, batch)
            texts = tokens.split(answer_lengths(whole))
            chosen_length, rejected_length = (answer_lengths(rows)[which::2] for which in (0, 1))
            entropy = torch.stack([-text.sum() for text in texts[::2]]) * (totals["pairs"] / totals["tokens"])
            chosen = torch.stack([text[-n:].mean() for text, n in zip(texts[::2], chosen_length, strict=True)])
            rejected = torch.stack([text[-n:].mean() for text, n in zip(texts[1::2], rejected_length, strict=True)])
            log_odds = chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))
            yield entropy - self.beta * logsigmoid(log_odds), self.beta * chosen.detach(), self.beta * rejected.detach()


def with_prompt(row: Row) -> Row:
    """The row with the prompt of its chosen answer learned too."""
    end = int(row.lengths[0])
    return row._replace(labels=np.concatenate([row.input_ids[:end], row.labels[end:]]))


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, without cancellation on either side of -ln 2."""
    near = x > -0.6931471805599453
    # Each branch gets values that are safe for it: a gradient of infinity times zero would not be a number.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0).clamp(max=-1e-12)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)
