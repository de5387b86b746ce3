"""Where a run computes: the GPU that was asked for, or the CPU when none was; never the CPU by accident."""

import logging
from typing import Any

import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.failures import GPU_NOT_VISIBLE, RunFailure
from finetune_trainer.methods.combinations import can_checkpoint
from finetune_trainer.training.precision import Precision, choose_precision, cpu_has_bf16

log = logging.getLogger(__name__)


def find_device(gpus: int, pretend: bool, local_rank: int = 0) -> torch.device:
    """cuda:<local rank> when GPUs were asked for, else cpu.

    Raises: RunFailure when fewer are visible than were asked for, unless the cluster only pretends to have them.
    """
    if gpus == 0:
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible >= gpus:
        torch.cuda.set_device(local_rank)  # what bitsandbytes and NCCL take for the current one
        return torch.device("cuda", local_rank)
    if pretend:
        log.warning(
            "device: %d GPUs asked for, %d visible; this cluster's GPUs are pretend, training on the CPU", gpus, visible
        )
        return torch.device("cpu")
    raise RunFailure(
        GPU_NOT_VISIBLE,
        f"resources.gpus asks for {gpus}, torch sees {visible} (built for CUDA {torch.version.cuda}); check the node's "
        "driver and device plugin and podTemplate.runtimeClassName, or set resources.gpus to 0 to train on the CPU",
    )


def find_precision(spec: FineTuneSpec, device: torch.device) -> Precision:
    """The number format of `training.precision` on this very device."""
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    precision = choose_precision(spec.training.precision, device.type, has_bf16)
    log.info("device: %s, %s", device, precision.compute)
    if precision.compute == "bfloat16" and not has_bf16:
        log.warning(
            "device: it has no bf16 instructions, emulating them is slow; training.precision Auto would use FP32"
        )
    return precision


def use_gradient_checkpointing(model: Any, spec: FineTuneSpec, needed: bool) -> bool:
    """Compute activations twice when asked to, or by itself when memory needs it; returns whether."""
    asked = spec.training.gradient_checkpointing
    wanted = can_checkpoint(spec) and (asked == "Enabled" or (asked == "Auto" and needed))
    if wanted:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        log.info("memory: gradient checkpointing is on")
    return wanted
