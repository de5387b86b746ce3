"""A base model shared out over two processes computes, bit for bit, what each of them would compute with all of it."""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.data.batches import Batch
from finetune_trainer.methods.initialization import Tensors, as_base, initialize, is_rebased
from finetune_trainer.training.checkpoint import Snapshot, State
from finetune_trainer.training.distributed import World
from finetune_trainer.training.precision import choose_precision
from finetune_trainer.training.quantization import load_base_model
from finetune_trainer.training.shards import Shards, Unit, blocks_of, parts_of
from tests.unit.trainer.pods import Pods

from .families import FAMILIES
from .tiny import finetune_spec, make_llama

pytestmark = pytest.mark.timeout(300)

CPU = torch.device("cpu")
HERE = "tests.unit.trainer.test_shards"
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA": ({"type": "LoRA", "lora": LORA}, "FP32"),
    "LoRA in 16 bit": ({"type": "LoRA", "lora": LORA | {"bias": "All"}}, "BF16"),
    "NF4": ({"type": "QLoRA", "lora": LORA}, "FP32"),
    "NF4 in 16 bit": ({"type": "QLoRA", "lora": LORA}, "BF16"),
    "FP4": ({"type": "QLoRA", "lora": LORA, "quantization": {"type": "FP4", "doubleQuant": False}}, "FP32"),
    "INT8": ({"type": "LoRA", "lora": LORA, "quantization": {"type": "INT8"}}, "FP32"),
    "head and embedding": (
        {"type": "LoRA", "lora": LORA | {"targetModules": ["lm_head", "embed_tokens", "down_proj"]}},
        "FP32",
    ),
    "DoRA": ({"type": "LoRA", "lora": LORA | {"useDora": True}}, "BF16"),
    "DoRA in NF4": ({"type": "QLoRA", "lora": LORA | {"useDora": True}}, "BF16"),
    "DoRA of head and embedding": (
        {"type": "LoRA", "lora": LORA | {"useDora": True, "targetModules": ["lm_head", "embed_tokens", "down_proj"]}},
        "FP32",
    ),
    "trained whole": (
        {"type": "LoRA", "lora": LORA | {"targetModules": ["q_proj"], "modulesToSave": ["lm_head", "up_proj"]}},
        "FP32",
    ),
    "trained whole beside NF4": (
        {"type": "QLoRA", "lora": LORA | {"modulesToSave": ["lm_head", "embed_tokens"]}},
        "BF16",
    ),
    "trained whole beside INT8": (
        {"type": "LoRA", "lora": LORA | {"modulesToSave": ["embed_tokens"]}, "quantization": {"type": "INT8"}},
        "FP32",
    ),
    "PiSSA": ({"type": "LoRA", "lora": LORA | {"initialization": "PiSSA"}}, "BF16"),
    "OLoRA": ({"type": "LoRA", "lora": LORA | {"initialization": "OLoRA"}}, "FP32"),
    "EVA": ({"type": "QLoRA", "lora": LORA | {"initialization": "EVA", "useDora": True}}, "FP32"),
    "LoftQ": ({"type": "QLoRA", "lora": LORA | {"initialization": "LoftQ"}}, "BF16"),
    "AdaLoRA": ({"type": "AdaLoRA"}, "FP32"),
    "IA3": ({"type": "IA3"}, "FP32"),
    "PromptTuning": ({"type": "PromptTuning", "virtualTokens": {"count": 3}}, "FP32"),
    "PTuning": ({"type": "PTuning", "virtualTokens": {"count": 3}}, "FP32"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), layers=4)


TIED = ("NF4", "head and embedding", "DoRA of head and embedding", "trained whole beside NF4", "PromptTuning")


@pytest.mark.parametrize(("ways", "tied"), [*((tuple(WAYS)[first::5], False) for first in range(5)), (TIED, True)])
def test_losses_gradients_and_logits_are_those_of_the_whole_model(
    ways: tuple[str, ...], tied: bool, tmp_path: Path
) -> None:
    model = make_llama(tmp_path / "llama", layers=4, tie_word_embeddings=tied)
    with Pods(2, tmp_path / "two", f"{HERE}:compare", str(model), str(tmp_path), ways) as pods:
        assert pods.wait(280) == [0, 0], pods.logs()
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        same = dict.fromkeys(("loss", "gradients", "logits", "base logits", "resumed base logits", "put away"), True)
        assert found == dict.fromkeys(ways, same)


def test_each_process_holds_about_half_of_the_bytes_and_never_more_than_a_block_besides(
    model: Path, tmp_path: Path
) -> None:
    with Pods(2, tmp_path / "two", f"{HERE}:weigh", str(model), str(tmp_path)) as pods:
        assert pods.wait() == [0, 0], pods.logs()
    for rank in (0, 1):
        for kind, (whole, here, most_while_loading, largest) in json.loads(
            (tmp_path / f"found-{rank}.json").read_text()
        ).items():
            assert 0.5 <= here / whole < 0.56, kind
            assert most_while_loading < here + 1.5 * largest, kind


def test_others_follow_what_the_first_process_does_alone(model: Path, tmp_path: Path) -> None:
    with Pods(2, tmp_path / "two", f"{HERE}:lead", str(model), str(tmp_path)) as pods:
        assert pods.wait() == [0, 0], pods.logs()
    whole, shared = json.loads((tmp_path / "found-0.json").read_text())
    assert whole == shared


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_says_what_its_blocks_are(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **FAMILIES[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert len(blocks_of(model)) == 2
    assert len(parts_of(model)) == 4
    shared = sum(p.numel() for part in parts_of(model).values() for p in part.parameters() if p.dim() > 1)
    every = sum(p.numel() for p in model.parameters())
    assert shared > 0.8 * every


# ---- what the processes do -------------------------------------------------------------------------------------------


def compare(model: str, folder: str, ways: tuple[str, ...]) -> int:
    """Two steps with an evaluation between them, whole and shared out."""
    found = {}
    with together() as world:
        for name in ways:
            method, precision = WAYS[name]
            spec = finetune_spec(method=method, training={"precision": precision})
            whole, shared = (two_steps(Path(model), spec, shards) for shards in (None, Shards(world, CPU)))
            found[name] = {what: torch.equal(whole[what], shared[what]) for what in whole}
    Path(folder, f"found-{world.rank}.json").write_text(json.dumps(found))
    return 0


def two_steps(folder: Path, spec: Any, shards: Shards | None) -> dict[str, torch.Tensor]:
    model, initial = adapted(folder, spec, shards)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn_like(parameter)
    ids = torch.arange(10, 40)[None]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=spec.training.precision == "BF16")
    losses = []
    for step in range(2):
        model.train()
        torch.manual_seed(step)
        with autocast:
            logits = model(input_ids=ids, use_cache=False).logits[0, -30:-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])
        loss.backward()
        losses.append(loss.detach())
        model.eval()
        with torch.no_grad(), autocast:
            logits = model(input_ids=ids, use_cache=False).logits
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    assert gradients.any() and torch.isfinite(gradients).all()
    with torch.no_grad(), autocast:
        with as_base(model, initial):
            base_logits = model(input_ids=ids, use_cache=False).logits
        again = base_logits
        if is_rebased(spec):
            snapshot = Snapshot(State(), {"initial": initial})
            resumed, _ = adapted(folder, spec, Shards(shards.world, CPU) if shards else None, snapshot)
            with as_base(resumed.eval(), initial):
                again = resumed(input_ids=ids, use_cache=False).logits
    pieces = [piece for unit in (shards.units if shards else ()) for piece in unit.pieces]
    put_away = torch.tensor(all(piece.here().untyped_storage().nbytes() <= 8 for piece in pieces))
    return {
        "loss": torch.stack(losses), "gradients": gradients, "logits": logits, "base logits": base_logits,
        "resumed base logits": again, "put away": put_away,
    }  # fmt: skip


def weigh(model: str, folder: str) -> int:
    """(bytes of the whole base, of this process's, the most while it is loaded, the largest unit) for each format."""
    found = {}
    with together() as world:
        for name in ("LoRA", "NF4", "INT8"):
            spec = finetune_spec(method=WAYS[name][0])
            whole = held(load(Path(model), spec, None))
            shards = Weighed(world)
            base = load(Path(model), spec, shards)
            found[name] = (whole, held(base, shards), shards.most, max(unit.bytes for unit in shards.units))
    Path(folder, f"found-{world.rank}.json").write_text(json.dumps(found))
    return 0


class Weighed(Shards):
    """Weighs all tensors of the process whenever a part of the model has been read."""

    def __init__(self, world: World) -> None:
        super().__init__(world, CPU)
        self.start, self.most = alive(), 0

    def take(self, part: torch.nn.Module) -> Unit:
        self.most = max(self.most, alive() - self.start)
        return super().take(part)


def alive() -> int:
    """Bytes behind every tensor of this process."""
    tensors = (found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and not found.is_meta)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(model: Any, shards: Shards | None = None) -> int:
    """Bytes behind a model's tensors, quantization constants and shards."""
    tensors = [*model.parameters(), *model.buffers(), *(unit.shard for unit in (shards.units if shards else ()))]
    for module in model.modules():
        weight, state = getattr(module, "weight", None), getattr(module, "state", None)
        tensors += [found for found in (getattr(state, "CB", None), getattr(weight, "CB", None)) if found is not None]
        if getattr(weight, "quant_state", None) is not None:
            tensors.append(weight.quant_state.absmax)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def lead(model: str, folder: str) -> int:
    """The first process generates alone."""
    spec = finetune_spec(method=WAYS["NF4"][0])
    with together() as world:
        shards = Shards(world, CPU)
        whole, shared = wrapped(Path(model), spec, None), wrapped(Path(model), spec, shards)
        if not world.leads:
            shards.follow()
            return 0
        ids = torch.arange(10, 20)[None]
        with shards.led():
            found = [one.eval().generate(input_ids=ids, max_new_tokens=5)[0].tolist() for one in (whole, shared)]
    Path(folder, "found-0.json").write_text(json.dumps(found))
    return 0


@contextmanager
def together() -> Iterator[World]:
    """The two processes as one group."""
    world = World(rank=int(os.environ["JOB_COMPLETION_INDEX"]), size=2)
    torch.distributed.init_process_group("gloo", rank=world.rank, world_size=world.size)
    yield world
    torch.distributed.destroy_process_group()


def load(folder: Path, spec: Any, shards: Shards | None) -> Any:
    precision = choose_precision(spec.training.precision, "cpu", has_bf16=True)
    return load_base_model(folder, spec, precision, CPU, shards)


def wrapped(folder: Path, spec: Any, shards: Shards | None) -> Any:
    """The base model with a fresh adapter."""
    return adapted(folder, spec, shards)[0]


def adapted(folder: Path, spec: Any, shards: Shards | None, snapshot: Snapshot | None = None) -> tuple[Any, Tensors]:
    """The base model with an adapter, fresh or of a run that goes on, and its start."""
    return initialize(load(folder, spec, shards), spec, 8, folder, iter([text()]), snapshot, shards)


def text() -> Batch:
    ids = torch.arange(10, 74)[None]
    return Batch(ids, torch.arange(64)[None], ids.roll(-1, 1), None, (64,), 64, 64)
