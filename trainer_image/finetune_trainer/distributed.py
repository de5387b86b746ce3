"""Several processes as one run: who they are, and the sums that they share. One process needs none of it."""

import os
from dataclasses import dataclass

import torch

from finetune_trainer.failures import WORLD_SIZE_MISMATCH, RunFailure
from finetune_trainer.runspec import RunSpec


@dataclass(frozen=True)
class World:
    """This process among all of the run (torchrun's RANK, WORLD_SIZE and LOCAL_RANK)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process reports, checkpoints and uploads."""
        return self.rank == 0


def join(run: RunSpec, device: torch.device) -> World:
    """Join the run's processes, one per GPU of each node (one per node on CPUs).

    Raises: RunFailure unless there are exactly as many as were asked for.
    """
    resources = run.spec.resources
    processes = resources.nodes * (max(1, resources.gpus) if device.type == "cuda" else 1)
    world = World(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
    if world.size != processes:
        raise RunFailure(
            WORLD_SIZE_MISMATCH,
            f"resources.nodes and resources.gpus ask for {processes} processes, {world.size} started; the effective "
            "batch would be another one, so nothing is trained",
        )
    if world.size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return world


def sum_gradients(world: World, parameters: list[torch.nn.Parameter]) -> None:
    """Add up all processes' gradients in one message: adapters are small, so there is nothing to overlap."""
    if world.size == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def summed(world: World, *values: float, device: torch.device) -> list[float]:
    """The sums of some numbers over all processes."""
    if world.size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def share_start(world: World, parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the first one's trainable weights."""
    if world.size > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)
