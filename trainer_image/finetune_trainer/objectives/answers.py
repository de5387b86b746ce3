"""Log probabilities of whole answers, which the objectives that compare answers are made of."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from finetune_trainer.data.batches import IGNORE, LAYOUTS, Batch, Row, samples
from finetune_trainer.objectives.loss import CHUNK, learned_logits
from finetune_trainer.training.attention import packed

BETA = 0.1  # the default of objective.beta for DPO, KTO and ORPO: as in their papers and in TRL
Autocast = Callable[[], AbstractContextManager[object]]


class _LogProbability(torch.autograd.Function):
    """Log probability of each target, with no more memory than the logits' own and one chunk in float32."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """logits [n, words] (overwritten by backward), targets [n] -> [n], float32."""
        found = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for part, wanted, place in zip(logits.split(CHUNK), targets.split(CHUNK), found.split(CHUNK), strict=True):
            exact = part.float()
            place.copy_(exact.gather(1, wanted[:, None])[:, 0] - exact.logsumexp(dim=-1))
        ctx.save_for_backward(logits, targets)
        return found

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        logits, targets = ctx.saved_tensors
        pieces = zip(logits.split(CHUNK), targets.split(CHUNK), gradient.split(CHUNK), strict=True)
        for part, wanted, outer in pieces:
            slope = part.float().softmax(dim=-1).neg_()
            slope[torch.arange(len(wanted), device=logits.device), wanted] += 1
            part.copy_(slope.mul_(outer[:, None]))
        return logits, None


def token_logprobs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Log probability [n] of each target token of a batch, sample by sample."""
    found: torch.Tensor = _LogProbability.apply(*learned_logits(model, batch))  # type: ignore[no-untyped-call]
    return found


def answer_lengths(rows: list[Row]) -> list[int]:
    """Target tokens of each sample of the rows."""
    return [int((targets != IGNORE).sum()) for row in rows for _, targets in samples(row)]


class Answers:
    """A model's log probabilities of answers, in a layout (data.LAYOUTS)."""

    def __init__(self, layout: str, autocast: Autocast) -> None:
        self.collate, self.autocast = LAYOUTS[layout], autocast

    @contextmanager
    def logprobs(self, model: torch.nn.Module, rows: list[Row], device: torch.device) -> Iterator[torch.Tensor]:
        """Log probability of the answer of every sample of the rows, in their order; backward must run within it."""
        batch = self.collate(rows).to(device)
        with packed(batch):
            with self.autocast():
                tokens = token_logprobs(model, batch)
            # Summed one by one: an index_add on a GPU adds in any order, and a resumed run would not be the same.
            yield torch.stack([part.sum() for part in tokens.split(answer_lengths(rows))])


def references(rows: list[Row], device: torch.device) -> torch.Tensor:
    """What the base model says of the rows' answers [rows, answers of a row]."""
    found = []
    for row in rows:
        assert row.reference is not None, "the reference is computed before the first step (reference.py)"
        found.append(torch.from_numpy(row.reference))
    return torch.stack(found).to(device)
