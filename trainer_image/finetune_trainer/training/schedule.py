"""Steps, rows and learning rate of a run: pure functions of the step, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Callable
from itertools import pairwise

Curve = Callable[[float], float]


def total_steps(rows: int, batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Optimizer steps of a run. Every step has exactly `batch_size` rows: the last one borrows from the next epoch."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(rows * (epochs or 1) / batch_size))


def warmup_steps(steps: int, ratio: float) -> int:
    return math.ceil(steps * ratio)


CURVES: dict[str, Curve] = {  # of the share of steps that is left after the warm-up, 1 to 0
    "Constant": lambda left: 1.0,
    "ConstantWithWarmup": lambda left: 1.0,
    "Linear": lambda left: left,
    "Polynomial": lambda left: left**2,
    "Cosine": lambda left: 0.5 * (1 + math.cos(math.pi * (1 - left))),
}


def learning_rate_factor(scheduler: str, step: int, steps: int, warmup: int, restarts: int = 1) -> float:
    """What the peak learning rate is multiplied by in `step` (0-based) of `steps`, after `warmup` steps of linear rise.

    The first warm-up step already learns (1/warmup, not 0), so that no step of a short run is wasted. `restarts`:
    cosine cycles of CosineWithRestarts.
    """
    if step < warmup and scheduler != "Constant":
        return (step + 1) / warmup
    if scheduler == "InverseSqrt":
        return math.sqrt(max(1, warmup) / max(1, warmup, step + 1))
    done = (step - warmup) / max(1, steps - warmup) if scheduler != "Constant" else 0.0
    if scheduler == "CosineWithRestarts":
        return CURVES["Cosine"](1 - done * restarts % 1)
    return CURVES[scheduler](1 - done)


def rows_of_rank(rows: list[int], rank: int, world_size: int) -> list[int]:
    """The rows that one process computes: neighbours, so that its micro batches are some of those that one process alone
    would have, wherever these come out even."""
    return cut(rows, world_size)[rank]


def micro_batches(rows: list[int], micro_batch: int) -> list[list[int]]:
    """Rows cut into micro batches of at most `micro_batch` rows."""
    return cut(rows, max(1, math.ceil(len(rows) / micro_batch)))


def cut(rows: list[int], count: int) -> list[list[int]]:
    """`count` parts, as even as can be: 10 rows cut in 3 are 4, 3, 3."""
    short, longer = divmod(len(rows), count)
    edges = [part * short + min(part, longer) for part in range(count + 1)]
    return [rows[a:b] for a, b in pairwise(edges)]


def passes_of_rank(rows: list[int], rank: int, world_size: int, micro_batch: int) -> tuple[list[list[int]], int]:
    """The micro batches of some rows that one process computes, and the most that any process has."""
    mine = micro_batches(rows_of_rank(rows, rank, world_size), micro_batch)
    most = micro_batches(rows_of_rank(rows, 0, world_size), micro_batch)
    return [chunk for chunk in mine if chunk], len([chunk for chunk in most if chunk])
