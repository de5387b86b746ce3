"""The figures of a run that are settled before its first step: steps, effective batch, micro batch."""

import logging
import math
from dataclasses import dataclass

from finetune_trainer.distributed import World
from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.runspec import RunSpec
from finetune_trainer.schedule import total_steps

log = logging.getLogger(__name__)

CPU_TOKENS = 4096  # of one micro batch on a CPU: larger ones are no faster and need more memory
GPU_TOKENS = 16384  # the same on a GPU whose memory is not known to the estimate


@dataclass(frozen=True)
class Plan:
    """`batch_size` rows make a step, on all processes together; each computes at most `micro_batch` of them at once.

    With packing a row holds several samples, so the batch counts packed rows.
    """

    steps: int
    batch_size: int
    micro_batch: int
    rows: int

    def epoch(self, step: int) -> float:
        """Passes over the rows that `step` steps make."""
        return step * self.batch_size / self.rows


def make_plan(run: RunSpec, rows: int, world: World, device: str) -> Plan:
    """The plan of this attempt. Raises: RunFailure when the batch cannot be shared out evenly."""
    training = run.spec.training
    if training.batch_size % world.size:
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            f"training.batchSize: {training.batch_size} rows cannot be shared by {world.size} processes; "
            f"use a multiple of {world.size}",
        )
    share = training.batch_size // world.size
    plan = Plan(
        steps=total_steps(rows, training.batch_size, training.epochs, training.max_steps),
        batch_size=training.batch_size,
        micro_batch=min(share, micro_batch(run, device)),
        rows=rows,
    )
    log.info(
        "plan: %d steps of %d rows (%d processes x %d accumulation steps of at most %d rows), %d rows in all",
        plan.steps, plan.batch_size, world.size, math.ceil(share / plan.micro_batch), plan.micro_batch, rows,
    )  # fmt: skip
    return plan


def micro_batch(run: RunSpec, device: str) -> int:
    """Rows at once: what the operator says after running out of memory, else what the user says, else what fits."""
    training, estimate = run.spec.training, run.prepared.estimate if run.prepared else None
    if run.micro_batch:
        return run.micro_batch
    if training.micro_batch_size != "auto":
        return int(training.micro_batch_size)
    largest = estimate.largest_micro_batch if estimate else None
    comfortable = max(1, (CPU_TOKENS if device == "cpu" else GPU_TOKENS) // training.max_length)
    return min(largest, comfortable) if largest else comfortable
