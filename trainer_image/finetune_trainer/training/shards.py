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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.training.distributed import World
from finetune_trainer.training.recompute import gathered, recomputed

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
            held = getattr(owner, name)
            if isinstance(
                held, torch.nn.Parameter
            ):  # perhaps another one than before: PEFT makes new ones of 4-bit ones
                held.data = tensor
            else:
                setattr(owner, name, tensor)

    def here(self) -> torch.Tensor:
        owner, name = self.places[0]
        tensor: torch.Tensor = getattr(owner, name).detach()
        return tensor


class Unit:
    """What is gathered at once: a block's matrices, or an embedding's."""

    def __init__(self, shards: "Shards", number: int, module: torch.nn.Module) -> None:
        """Keep this process's part of the module's matrices and let go of the rest."""
        self.shards, self.number, self.pieces, self._users = shards, number, list[Piece](), 0
        world, start = shards.world, 0
        for tensor, places in _matrices(module):
            size = tensor.numel() * tensor.element_size()
            self.pieces.append(Piece(places, tensor.shape, tensor.dtype, start, size))
            start += -(-size // ALIGNMENT) * ALIGNMENT
        share = -(-start // (world.size * ALIGNMENT)) * ALIGNMENT
        self.shard = torch.zeros(share, dtype=torch.uint8, device=shards.device)
        self.bytes = start
        self._keep_own_part()
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

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Within it the module has its weights, and what becomes of them is kept. All do the same to them."""
        with self.gathered():
            yield
            self._keep_own_part()

    def collect(self) -> "Collection":
        """Begin to bring all processes' parts together in each of them."""
        whole = torch.empty(len(self.shard) * self.shards.world.size, dtype=torch.uint8, device=self.shard.device)
        return Collection(self, whole, torch.distributed.all_gather_single(whole, self.shard, async_op=True))

    def _keep_own_part(self) -> None:
        share = len(self.shard)
        first = share * self.shards.world.rank
        for piece in self.pieces:
            low, high = max(first, piece.start), min(first + share, piece.start + piece.size)
            if low < high:
                flat = piece.here().reshape(-1).view(torch.uint8)
                self.shard[low - first : high - first].copy_(flat[low - piece.start : high - piece.start])

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
            part.forward = recomputed(unit, forward) if part in blocks else gathered(unit, forward)
        self._blocks = [self.take(block) for block in blocks]
        whole, here = sum(unit.bytes for unit in self.units), sum(len(unit.shard) for unit in self.units)
        log.info(
            "base model: shared out over %d processes, %.1f of %.1f MB of its matrices here; blocks are computed twice",
            self.world.size, here / 1e6, whole / 1e6,
        )  # fmt: skip

    @contextmanager
    def adapting(self, model: "PreTrainedModel") -> Iterator[None]:
        """Within it PEFT wraps the model: it gets whole weights where it reads or changes them, one part at a time.

        PEFT marks most of those places for DeepSpeed's ZeRO stage 3 (gather_params_ctx); the other is the copy of what
        is trained whole. All processes do the same, in the same order.
        """
        from peft.tuners.lora import dora, layer
        from peft.utils import integrations
        from peft.utils.other import ModulesToSaveWrapper

        here = ExitStack()  # the part that was needed last
        open_now: list[Unit] = []

        def bring(parameters: Iterable[torch.nn.Parameter]) -> None:
            units = {self._by_parameter[id(p)] for p in parameters if id(p) in self._by_parameter}
            if units - set(open_now):
                here.close()
                open_now[:] = units
                for unit in sorted(units, key=lambda unit: unit.number):
                    here.enter_context(unit.changed())

        @contextmanager
        def gather(parameters: torch.nn.Parameter | Iterable[torch.nn.Parameter], *_: Any) -> Iterator[None]:
            bring([parameters] if isinstance(parameters, torch.nn.Parameter) else parameters)
            yield

        def update(wrapper: Any, name: str, *rest: Any, **options: Any) -> None:
            bring(wrapper.original_module.parameters())
            copy_original(wrapper, name, *rest, **options)
            vars(wrapper.modules_to_save[name]).pop("forward", None)  # its weights stay here

        whole: Any = ModulesToSaveWrapper
        gather_zero, copy_original = integrations.gather_params_ctx, whole.update
        for module in (integrations, layer, dora):
            module.gather_params_ctx = gather  # type: ignore[attr-defined]
        whole.update = update
        try:
            with here:
                yield
        finally:
            for module in (integrations, layer, dora):
                module.gather_params_ctx = gather_zero  # type: ignore[attr-defined]
            whole.update = copy_original
        for wrapper in model.modules():
            unit = self._by_module.get(id(getattr(wrapper, "base_layer", None)))
            if unit is not None:  # DoRA of an embedding or head reads weights beside that layer's own pass
                wrapper.forward = gathered(unit, wrapper.forward)

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
        for name, parameter in part.named_parameters(recurse=False):
            state: Any = getattr(parameter, "quant_state", None)
            if parameter.dim() < 2:
                continue
            if getattr(parameter, "CB", None) is not None:
                part.init_8bit_state()  # type: ignore[operator]  # what the first forward pass does
                yield parameter.data, ((part, name), (part.state, "CB"))
                continue
            yield parameter.data, ((part, name),)
            if state is not None:
                yield state.absmax, ((state, "absmax"),)
