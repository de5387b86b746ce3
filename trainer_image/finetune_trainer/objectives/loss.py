"""The SFT loss: cross entropy of the tokens to be learned, computed from their positions only."""

import inspect
from typing import Any, NamedTuple

import torch

from finetune_trainer.data.batches import IGNORE, Batch
from finetune_trainer.training.attention import packed

CHUNK = 1024  # positions whose float32 logits exist at once


class _CrossEntropy(torch.autograd.Function):
    """Sum of cross entropies, whose gradient takes the place of the logits.

    A plain cross entropy keeps logits, float32 logits and softmax at once: with 128k words that is the peak of the
    whole run. This keeps the logits' own memory and one chunk.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
        """logits [n, words] (overwritten), targets [n] -> (sum of losses, number of right guesses)."""
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        right = torch.zeros((), dtype=torch.int64, device=logits.device)
        for part, wanted in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True):
            exact = part.float()
            normaliser = exact.logsumexp(dim=-1)
            loss += (normaliser - exact.gather(1, wanted[:, None])[:, 0]).sum()
            right += (exact.argmax(dim=-1) == wanted).sum()
            if ctx.needs_input_grad[0]:
                gradient = exact.sub_(normaliser[:, None]).exp_()
                gradient[torch.arange(len(wanted), device=logits.device), wanted] -= 1
                part.copy_(gradient)
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx, loss_gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(loss_gradient.to(gradient.dtype)), None


class TokenLoss(NamedTuple):
    """Sums over a batch, so that batches of different token counts add up right."""

    loss: torch.Tensor
    right: torch.Tensor
    tokens: int


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model can compute logits at chosen positions only (most of transformers' can)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def learned_logits(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, words] of the positions that are to predict something, sample by sample, and what that is [n].

    Call it, and the backward of what is made of it, within `attention.packed`.
    """
    targets = batch.targets.flatten()
    learned = (targets != IGNORE).nonzero()[:, 0]
    arguments: dict[str, object] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if batch.attention_mask is not None:
        arguments["attention_mask"] = batch.attention_mask
    if batch.attention_mask is None and takes_logits_to_keep(model):
        logits = model(**arguments, logits_to_keep=learned).logits[0]
    else:
        logits = model(**arguments).logits
        # Prompt-type methods put their virtual tokens before the row: the row's own positions are the last ones.
        logits = logits[:, -batch.targets.shape[1] :].flatten(0, 1)[learned]
    return logits, targets[learned]


def token_loss(model: torch.nn.Module, batch: Batch) -> TokenLoss:
    """Summed cross entropy of the batch's target tokens."""
    logits, targets = learned_logits(model, batch)
    loss, right = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return TokenLoss(loss, right, len(targets))


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """All logits of a batch [tokens, words], without padding: for comparing two layouts."""
    with packed(batch):
        logits: torch.Tensor = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits
    if batch.attention_mask is None:
        return logits[0]
    return torch.cat([row[:len_] for row, len_ in zip(logits, batch.lengths, strict=True)])
