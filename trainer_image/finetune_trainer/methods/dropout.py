"""LoRA layers that cost less: inputs stay in the format that they have, and dropout on a CPU draws four masks at once.

PEFT copies every input of a LoRA layer to float32, the format of the trained weights, and autocast copies it back. And
torch's dropout on a CPU keeps a mask as large as the input and draws each of its numbers alone: together a fifth of a
step, and most of its memory.
"""

from typing import Any

import torch

PARTS = 1 << 16  # what probabilities are rounded to


class _Dropout(torch.autograd.Function):
    """Keeps one byte per input for the backward pass."""

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, dropped: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """inputs of any shape; `dropped` of PARTS become 0, the others grow by as much."""
        count = inputs.numel()
        words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        zeroed = words.view(torch.int16)[:count].view(inputs.shape) < dropped - PARTS // 2
        ctx.save_for_backward(zeroed)
        ctx.scale = PARTS / (PARTS - dropped)
        return inputs.masked_fill(zeroed, 0).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        (zeroed,) = ctx.saved_tensors
        return gradient.masked_fill(zeroed, 0).mul_(ctx.scale), None


class Dropout(torch.nn.Dropout):
    """torch's dropout, on a CPU with a random number for every four inputs."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * PARTS)
        if inputs.device.type != "cpu" or not self.training or not 0 < dropped < PARTS:
            return super().forward(inputs)
        result: torch.Tensor = _Dropout.apply(inputs, dropped)  # type: ignore[no-untyped-call]
        return result


def as_it_is(inputs: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """In place of PEFT's cast: autocast brings inputs and weights together by itself."""
    if inputs is None or torch.is_autocast_enabled(inputs.device.type):
        return inputs
    return inputs.to(dtype)


def lighten(model: torch.nn.Module) -> None:
    """Make the plain LoRA layers of a model cheap. Variants such as DoRA compute with the copy, and keep it."""
    for layer in model.modules():
        dropouts: Any = getattr(layer, "lora_dropout", None)
        if not isinstance(dropouts, torch.nn.ModuleDict) or getattr(layer, "lora_variant", None):
            continue
        layer._cast_input_dtype = as_it_is  # type: ignore[assignment]
        for name, dropout in dropouts.items():
            if type(dropout) is torch.nn.Dropout:
                dropouts[name] = Dropout(dropout.p)
