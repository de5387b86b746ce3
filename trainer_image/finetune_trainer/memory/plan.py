"""The figures of a run that are settled before its first step: steps, effective batch, micro batch."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetune_trainer.data.batches import Rows
from finetune_trainer.failures import DOES_NOT_FIT, UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.memory.architecture import Architecture, architecture, read_config
from finetune_trainer.memory.estimate import Workload, estimate, longest_row
from finetune_trainer.memory.verdict import placed, what_would_fit
from finetune_trainer.methods.combinations import can_checkpoint
from finetune_trainer.methods.experts import adapts_experts
from finetune_trainer.runspec import RunSpec
from finetune_trainer.training.distributed import World, least
from finetune_trainer.training.schedule import total_steps

log = logging.getLogger(__name__)

CPU_TOKENS = 4096  # of one micro batch on a CPU: more are no faster
GPU_TOKENS = 16384  # the same on a GPU
FEW_TOKENS = 2048  # below this a GPU idles: rather compute activations twice than have smaller micro batches


@dataclass(frozen=True)
class Plan:
    """`batch_size` rows make a step, on all processes together; each computes at most `micro_batch` of them at once.

    With packing a row holds several samples, so the batch counts packed rows. `checkpointing`: whether activations must
    be computed twice for that micro batch to fit. `shards`: processes that share the base model, 1: each holds it whole.
    """

    steps: int
    batch_size: int
    micro_batch: int
    rows: int
    checkpointing: bool = False
    shards: int = 1

    def epoch(self, step: int) -> float:
        """Passes over the rows that `step` steps make."""
        return step * self.batch_size / self.rows


def make_plan(run: RunSpec, model: Path, rows: Rows, world: World, device: torch.device) -> Plan:
    """The plan of this attempt. Raises: RunFailure when the batch cannot be shared out evenly."""
    training = run.spec.training
    if training.batch_size % world.size:
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            f"training.batchSize: {training.batch_size} rows cannot be shared by {world.size} processes; "
            f"use a multiple of {world.size}",
        )
    share = training.batch_size // world.size
    config = read_config(model)
    shape = None if adapts_experts(run.spec, config) else architecture(config)
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    whole = least(world, choose_shards(run, shape, memory) == 1, device)
    shards = 1 if whole else world.size  # pretended GPUs are fewer processes than GPUs
    micro_batch, checkpointing = as_all_can(world, *choose_micro_batch(run, shape, share, memory, shards), device)
    plan = Plan(
        steps=total_steps(len(rows), training.batch_size, training.epochs, training.max_steps),
        batch_size=training.batch_size,
        micro_batch=min(share, micro_batch),
        rows=len(rows),
        checkpointing=checkpointing,
        shards=shards,
    )
    log.info(
        "plan: %d steps of %d rows: %d processes, %d accumulation steps of at most %d rows; %d rows in all",
        plan.steps, plan.batch_size, world.size, math.ceil(share / plan.micro_batch), plan.micro_batch, plan.rows,
    )  # fmt: skip
    return plan


def as_all_can(world: World, micro_batch: int, checkpointing: bool, device: torch.device) -> tuple[int, bool]:
    """What the GPU with the least memory can do: all make the same passes, which come together in each."""
    return least(world, micro_batch, device), not least(world, not checkpointing, device)


def choose_shards(run: RunSpec, shape: Architecture | None, memory: int | None) -> int:
    """How many processes share the base model: as prepare's verdict says where it knew the GPU's memory, else by what
    the GPU has (bytes; None on a CPU).
    """
    told = run.prepared.estimate if run.prepared else None
    if told is not None and told.verdict == "Fits":
        return told.shards or 1
    if shape is None or memory is None:
        return 1
    return placed(shape, Workload(run.spec, longest_row(run.spec)), memory).shards


def choose_micro_batch(
    run: RunSpec, shape: Architecture | None, share: int, memory: int | None, shards: int = 1
) -> tuple[int, bool]:
    """(rows at once, whether activations must be computed twice).

    What the operator says after running out of memory, else what the user says, else the largest that the GPU's memory
    (bytes; None on a CPU) has room for, up to the size beyond which nothing becomes faster. Raises: RunFailure when
    even the weights have no room.
    """
    asked, row_tokens = run.spec.training.micro_batch_size, longest_row(run.spec)
    comfortable = max(1, (CPU_TOKENS if memory is None else GPU_TOKENS) // row_tokens)
    if run.micro_batch:
        return run.micro_batch, memory is not None
    if memory is None:
        return (comfortable if asked == "auto" else int(asked)), False
    if shape is None:
        return (1 if asked == "auto" else int(asked)), True
    work = Workload(run.spec, row_tokens, shards=shards)
    if estimate(shape, replace(work, row_tokens=1), 1, checkpointing=True).low > memory:
        raise RunFailure(DOES_NOT_FIT, what_would_fit(shape, work, memory))

    def fits(rows: int, checkpointing: bool) -> bool:
        return estimate(shape, work, rows, checkpointing).high <= memory

    if asked != "auto":
        return int(asked), not fits(int(asked), checkpointing=False)
    sizes = [rows for rows in range(1, min(share, comfortable) + 1) if share % rows == 0]
    plain = max((rows for rows in sizes if fits(rows, checkpointing=False)), default=0)
    if not can_checkpoint(run.spec):
        return max(1, plain), False
    twice = max((rows for rows in sizes if fits(rows, checkpointing=True)), default=1)
    if plain == max(sizes) or plain * row_tokens >= FEW_TOKENS:
        return plain, False
    return twice, True
