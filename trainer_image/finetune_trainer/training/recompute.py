"""A part of a shared-out base model computes: its weights come before its pass, and again before its gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

if TYPE_CHECKING:
    from finetune_trainer.training.shards import Unit


def gathered(unit: "Unit", forward: Callable[..., Any]) -> Callable[..., Any]:
    """A pass within which a part has its weights.

    What autograd keeps of an output head's weights until its backward, which comes next, are views of them.
    """

    @wraps(forward)
    def gather(*args: Any, **kwargs: Any) -> Any:
        with unit.gathered():
            return forward(*args, **kwargs)

    return gather


def recomputed(unit: "Unit", forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's pass, computed again with weights gathered again when its gradients are asked for."""
    once = gathered(unit, forward)

    @wraps(forward)
    def twice(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return once(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        learning = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        tensors = [leaves[at] for at in learning]
        call = _Call(unit, once, [None if at in learning else leaf for at, leaf in enumerate(leaves)], spec, learning)
        # The first block's input does not learn, but its adapter does.
        learns = torch.empty(0, device=unit.shard.device, requires_grad=True)
        return _Recomputed.apply(call, True, learns, *tensors)  # type: ignore[no-untyped-call]

    return twice


@dataclass(frozen=True)
class _Call:
    """A block's forward pass, to be done with other tensors in the places of those that learn."""

    unit: "Unit"
    forward: Callable[..., Any]
    leaves: list[Any]
    spec: pytree.TreeSpec
    learning: list[int]

    def __call__(self, _: torch.Tensor, *tensors: torch.Tensor) -> Any:
        leaves = list(self.leaves)
        for at, tensor in zip(self.learning, tensors, strict=True):
            leaves[at] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.forward(*args, **kwargs)


class _Recomputed(CheckpointFunction):
    """Computes a block again in its backward pass, and keeps the weights until that is through: quantized layers read
    them there, past what autograd saves. (Without reentrance bitsandbytes would keep those of the first pass alive.)
    """

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with ctx.run_function.unit.gathered():
            return CheckpointFunction.backward(ctx, *gradients)
