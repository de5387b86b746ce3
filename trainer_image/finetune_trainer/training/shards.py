"""A frozen base model shared out over the processes: each holds an equal part of every block, and all bring a block
together while it computes.

This is ZeRO stage 3 (Rajbhandari et al. 2020) for weights that nobody trains: there are no gradients to scatter, so all
there is to do is to gather bytes. torch's own fully_shard (2.13) was tried first, as two gloo processes: 16-bit and NF4
weights trained as here, but INT8 layers failed ("'Parameter' object has no attribute 'CB'"), the constants of 4-bit
weights stayed whole in every process, and PEFT had to wrap a block before it was sharded (a DTensor has no quant_type),
when the whole model had to be on the GPU. Here parameters stay what PEFT and bitsandbytes know, and only their data
comes and goes.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.training.distributed import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes: what vector instructions and CUDA kernels may count on
DONE = -1

Place = tuple[Any, str]  # an object and the attribute of it that holds a tensor


@dataclass(frozen=True)
class Piece:
    """One tensor among the bytes of a unit, and the places that hold it."""

    places: tuple[Place, ...]
    shape: torch.Size
    dtype: torch.dtype
    start: int
    size: int

    def put(self, tensor: torch.Tensor) -> None:
        for owner, name in self.places:
            setattr(owner, name, tensor)


class Unit:
    """What is gathered at once: a block's matrices, or an embedding's."""

    def __init__(self, shards: "Shards", number: int, module: torch.nn.Module) -> None:
        """Keep this process's part of the module's matrices and let go of the rest."""
        self.shards, self.number, self.pieces, self._users = shards, number, list[Piece](), 0
        world, start = shards.world, 0
        found = list(_matrices(module))
        for tensor, places in found:
            size = tensor.numel() * tensor.element_size()
            self.pieces.append(Piece(places, tensor.shape, tensor.dtype, start, size))
            start += -(-size // ALIGNMENT) * ALIGNMENT
        share = -(-start // (world.size * ALIGNMENT)) * ALIGNMENT
        self.shard = torch.zeros(share, dtype=torch.uint8, device=shards.device)
        first = share * world.rank
        for (tensor, _), piece in zip(found, self.pieces, strict=True):
            low, high = max(first, piece.start), min(first + share, piece.start + piece.size)
            if low < high:
                flat = tensor.detach().reshape(-1).view(torch.uint8)
                self.shard[low - first : high - first].copy_(flat[low - piece.start : high - piece.start])
        self.bytes = start
        self._put_away()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the module has its weights. All processes come here together."""
        self._users += 1
        try:
            if self._users == 1:
                whole = self.shards.fetch(self)
                for piece in self.pieces:
                    flat = whole[piece.start : piece.start + piece.size]
                    piece.put(flat.view(piece.dtype).view(piece.shape))
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._put_away()

    def collect(self) -> "Collection":
        """Begin to bring all processes' parts together in each of them."""
        whole = torch.empty(len(self.shard) * self.shards.world.size, dtype=torch.uint8, device=self.shard.device)
        return Collection(self, whole, torch.distributed.all_gather_single(whole, self.shard, async_op=True))

    def _put_away(self) -> None:
        """Shapes, types and devices stay to be seen; who computes with what is not there gets no number."""
        for piece in self.pieces:
            nothing = math.nan if piece.dtype.is_floating_point else 0
            piece.put(torch.full((), nothing, dtype=piece.dtype, device=self.shard.device).expand(piece.shape))


@dataclass(frozen=True)
class Collection:
    """A unit's bytes on their way here."""

    unit: Unit
    whole: torch.Tensor
    work: Any

    def arrived(self) -> torch.Tensor:
        self.work.wait()
        return self.whole


class Shards:
    """This process's part of a base model."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world, self.device, self.units = world, device, list[Unit]()
        self._by_module: dict[int, Unit] = {}
        self._by_parameter: dict[int, Unit] = {}
        self._blocks: list[Unit] = []
        self._last = 0  # place of the block that was computed last
        self._coming: Collection | None = None
        self._told = False

    # ---- loading -----------------------------------------------------------------------------------------------------

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within it transformers loads a model part by part: what is complete is shared out before more is read.

        transformers calls set_param_for_module for each parameter that it has read (and quantized), in the order of
        their names, and has no other place to step in. Read ahead, or a warm-up of the GPU's allocator with the size of
        the whole model, would take the very memory that there is not.
        """
        from transformers import core_model_loading, modeling_utils

        parts: dict[str, torch.nn.Module] = {}
        set_parameter, warm_up = core_model_loading.set_param_for_module, modeling_utils.caching_allocator_warmup
        read_ahead = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")

        def set_and_share(model: "PreTrainedModel", name: str, *rest: Any) -> None:
            set_parameter(model, name, *rest)
            parts.update(parts or parts_of(model))
            for path, part in parts.items():
                if name.startswith(f"{path}.") and all(not p.is_meta for p in part.parameters()):
                    self.take(part)

        core_model_loading.set_param_for_module = set_and_share  # type: ignore[assignment]
        modeling_utils.caching_allocator_warmup = lambda *_: None
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        try:
            yield
        finally:
            core_model_loading.set_param_for_module = set_parameter
            modeling_utils.caching_allocator_warmup = warm_up
            os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
            if read_ahead is not None:
                os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = read_ahead

    def take(self, part: torch.nn.Module) -> Unit:
        """The unit of a part of the model; tied embeddings are one."""
        known = [self._by_parameter[id(p)] for p in part.parameters() if id(p) in self._by_parameter]
        unit = self._by_module.get(id(part)) or next(iter(known), None)
        if unit is None:
            unit = Unit(self, len(self.units), part)
            self.units.append(unit)
            self._by_parameter |= dict.fromkeys(map(id, part.parameters()), unit)
        self._by_module[id(part)] = unit
        return unit

    def attach(self, model: "PreTrainedModel") -> None:
        """Make every part of a loaded model bring its weights together when it computes."""
        blocks = blocks_of(model)
        for part in parts_of(model).values():
            unit, forward = self.take(part), part.forward
            part.forward = _recomputed(unit, forward) if part in blocks else _gathered(unit, forward)
        self._blocks = [self.take(block) for block in blocks]
        whole, here = sum(unit.bytes for unit in self.units), sum(len(unit.shard) for unit in self.units)
        log.info(
            "base model: shared out over %d processes, %.1f of %.1f MB of its matrices here; blocks are computed twice",
            self.world.size, here / 1e6, whole / 1e6,
        )  # fmt: skip

    # ---- computing ---------------------------------------------------------------------------------------------------

    def fetch(self, unit: Unit) -> torch.Tensor:
        """A unit's bytes; the block that follows is on its way while this one computes."""
        if self._told:
            self._said(unit.number)
            return unit.collect().arrived()
        coming, self._coming = self._coming, None
        if coming and coming.unit is not unit:
            coming.arrived()
            coming = None
        whole = (coming or unit.collect()).arrived()
        following = self._following(unit)
        self._coming = following.collect() if following else None
        return whole

    def _following(self, unit: Unit) -> Unit | None:
        """The block after this one: they come up in the forward pass and down in the backward pass, in all processes
        alike."""
        if unit not in self._blocks:
            return None
        place = self._blocks.index(unit)
        up, self._last = place > self._last or place == self._last == 0, place
        place += 1 if up else -1
        return self._blocks[place] if 0 <= place < len(self._blocks) else None

    # ---- the first process alone -------------------------------------------------------------------------------------

    @contextmanager
    def led(self) -> Iterator[None]:
        """Within it the first process computes alone, while the others `follow`."""
        self._told = True
        try:
            yield
        finally:
            self._said(DONE)
            self._told = False

    def follow(self) -> None:
        """Hand over parts of what the first process computes, until it is done."""
        while (number := self._said(DONE)) != DONE:
            self.units[number].collect().arrived()

    def _said(self, number: int) -> int:
        said = torch.tensor([number], device=self.device)
        torch.distributed.broadcast(said, 0)
        return int(said)


def parts_of(model: "PreTrainedModel") -> dict[str, torch.nn.Module]:
    """What a model's bytes are in, by name: its blocks, its word embedding and its output head."""
    names = {module: name for name, module in model.named_modules()}
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return {names[part]: part for part in (*blocks_of(model), *embeddings) if part in names}


def blocks_of(model: "PreTrainedModel") -> list[torch.nn.Module]:
    """The decoder's blocks, as the model's class names them for whoever cuts it into pieces."""
    kinds = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            f"baseModel: {type(model).__name__} does not say what its blocks are, so it cannot be shared out over GPUs; "
            "use a GPU that holds it whole, or another base model",
        )
    return blocks


def _matrices(module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, tuple[Place, ...]]]:
    """Each large tensor and what refers to it. Vectors stay whole: they are small, and biases may be trained."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            state: Any = getattr(parameter, "quant_state", None)
            if parameter.dim() < 2:
                continue
            if getattr(parameter, "CB", None) is not None:
                part.init_8bit_state()  # type: ignore[operator]  # what the first forward pass does
                yield parameter.data, ((parameter, "data"), (part.state, "CB"))
                continue
            yield parameter.data, ((parameter, "data"),)
            if state is not None:
                yield state.absmax, ((state, "absmax"),)


def _gathered(unit: Unit, forward: Callable[..., Any]) -> Callable[..., Any]:
    """What autograd keeps of an output head's weights until its backward, which comes next, are views of them."""

    @wraps(forward)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        with unit.gathered():
            return forward(*args, **kwargs)

    return gathered


def _recomputed(unit: Unit, forward: Callable[..., Any]) -> Callable[..., Any]:
    gathered = _gathered(unit, forward)

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return gathered(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        learning = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        tensors = [leaves[at] for at in learning]
        call = _Call(
            unit, gathered, [None if at in learning else leaf for at, leaf in enumerate(leaves)], spec, learning
        )
        # The first block's input does not learn, but its adapter does.
        learns = torch.empty(0, device=unit.shard.device, requires_grad=True)
        return _Recomputed.apply(call, True, learns, *tensors)  # type: ignore[no-untyped-call]

    return recomputed


@dataclass(frozen=True)
class _Call:
    """A block's forward pass, to be done with other tensors in the places of those that learn."""

    unit: Unit
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
