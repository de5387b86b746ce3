"""Several processes as one run: who they are, and the sums that they share. One process needs none of it."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from finetune_trainer.failures import UNSUPPORTED_COMBINATION, WORLD_SIZE_MISMATCH, RunFailure
from finetune_trainer.launch import processes_per_node
from finetune_trainer.runspec import RunSpec

Thing = TypeVar("Thing")


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


def find_world(run: RunSpec) -> World:
    """This process among as many as were asked for: one per GPU of each node, one per node on CPUs.

    Raises: RunFailure when another number was started.
    """
    world = World(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
    asked = run.spec.resources.nodes * processes_per_node(run)
    if world.size != asked:
        raise RunFailure(
            WORLD_SIZE_MISMATCH,
            f"resources.nodes and resources.gpus ask for {asked} processes, {world.size} started; the effective "
            "batch would be another one, so nothing is trained",
        )
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


def sum_tensor(world: World, tensor: torch.Tensor) -> None:
    """Add up a tensor of the same shape in all processes, in place."""
    if world.size > 1:
        torch.distributed.all_reduce(tensor)


def gathered(world: World, own: list[Thing]) -> list[Thing]:
    """What all processes have, in the order of their ranks."""
    if world.size == 1:
        return own
    lists: list[list[Thing]] = [[] for _ in range(world.size)]
    torch.distributed.all_gather_object(lists, own)
    return [thing for one in lists for thing in one]


def wait_for_all(world: World, device: torch.device) -> None:
    """Returns once every process has come to this point."""
    summed(world, 0.0, device=device)


def as_leader_says(world: World, value: int, device: torch.device) -> int:
    """The first process's number, in every process."""
    return int(summed(world, float(value if world.leads else 0), device=device)[0])


def least(world: World, value: int, device: torch.device) -> int:
    """The smallest of all processes' numbers, in every process."""
    tensor = torch.tensor(value, device=device)
    if world.size > 1:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN)
    return int(tensor)


def accompanied(chunks: list[list[int]], most: int, go: Callable[[], object]) -> Iterator[list[int]]:
    """The chunks, and after them as many passes for nothing as another process has chunks more: what is shared out over
    the processes is gathered by all together, so all make `most` passes.
    """
    yield from chunks
    for _ in range(most - len(chunks)):
        go()


@contextmanager
def first_on_node(world: World, device: torch.device) -> Iterator[None]:
    """Within it the first process of each node goes before its others, which find what it wrote."""
    if world.local_rank:
        wait_for_all(world, device)
    yield
    if not world.local_rank:
        wait_for_all(world, device)


def share_start(
    world: World, parameters: list[torch.nn.Parameter], taken_out: Iterable[torch.Tensor], device: torch.device
) -> None:
    """Give every process the first one's trainable weights.

    `taken_out`: of the base weights for this start (PiSSA, OLoRA). Raises: RunFailure where it is not the same everywhere.
    """
    if world.size == 1:
        return
    for parameter in parameters:
        torch.distributed.broadcast(parameter.data, 0)
    differ = 0
    for own in taken_out:
        leaders = own.detach().to(device, copy=True)
        torch.distributed.broadcast(leaders, 0)
        differ += not torch.equal(leaders, own.to(device))
    if summed(world, float(differ), device=device)[0]:
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            "method.lora.initialization: processes on different hardware computed different starts; run on nodes of one "
            "kind (podTemplate.nodeSelector), or use initialization: Default",
        )
