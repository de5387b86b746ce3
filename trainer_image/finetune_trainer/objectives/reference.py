"""What the base model says of each answer, for the objectives that compare with it: computed once, before the first
step, and kept in the checkpoints, because another batch or another machine would compute other last bits."""

import logging
import math
import time
from typing import TYPE_CHECKING

import torch

from finetune_trainer.data.batches import Rows, batch_rows
from finetune_trainer.memory.plan import Plan
from finetune_trainer.methods.initialization import Tensors, as_base
from finetune_trainer.objectives.objective import Objective, Referring
from finetune_trainer.training.checkpoint import Snapshot
from finetune_trainer.training.distributed import World, accompanied, sum_tensor
from finetune_trainer.training.schedule import passes_of_rank

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)
LOG_EVERY = 10.0


@torch.no_grad()
def set_references(
    model: "PeftModel",
    initial: Tensors,
    objective: Objective,
    splits: dict[str, tuple[Rows, list[int]]],
    micro_batch: int,
    world: World,
    device: torch.device,
    snapshot: Snapshot | None,
) -> Tensors:
    """Give each split's rows their references: of the snapshot that is resumed, else by the model as it starts, with
    its adapter off. `splits`: rows, and the indices of those that the run will use. Returns what belongs into
    checkpoints: nothing for an objective that does not refer to the base model."""
    if not isinstance(objective, Referring):
        return {}
    found = snapshot.tensors["reference"] if snapshot else {}
    model.eval()
    for split, (rows, used) in splits.items():
        if split not in found:
            with as_base(model, initial):
                found[split] = _computed(model, objective, rows, used, micro_batch, world, device)
        rows.reference = found[split].numpy()
    return found


def _computed(
    model: torch.nn.Module,
    objective: Referring,
    rows: Rows,
    used: list[int],
    micro_batch: int,
    world: World,
    device: torch.device,
) -> torch.Tensor:
    """[rows, 2]; what is not used is not a number, so that a wrong use of it does not pass unseen."""
    found = torch.zeros(len(rows), 2, device=device)
    started = logged = time.monotonic()
    mine, most = passes_of_rank(used, world.rank, world.size, micro_batch)
    for done, chunk in enumerate(
        accompanied(mine, most, lambda: objective.logprobs(model, [rows[used[0]]], device)), start=1
    ):
        found[chunk] = objective.logprobs(model, [rows[index] for index in chunk], device)
        if time.monotonic() - logged > LOG_EVERY:
            logged = time.monotonic()
            log.info("reference: %d of %d rows by the base model", done * micro_batch, sum(map(len, mine)))
    sum_tensor(world, found)  # each process computed its own rows, the others are zero
    log.info("reference: %d rows by the base model in %.1f s", len(used), time.monotonic() - started)
    unused = torch.ones(len(rows), dtype=torch.bool, device=device)
    unused[used] = False
    found[unused] = math.nan
    return found.cpu()


def rows_used(plan: Plan, seed: int) -> list[int]:
    """The rows that a run of `plan` sees: all of them, unless it ends within its first pass."""
    return sorted(batch_rows(0, min(plan.rows, plan.steps * plan.batch_size), plan.rows, seed))
