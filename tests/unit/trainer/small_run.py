"""A run on a model in memory, without a bucket: what the loop's and the methods' tests share."""

from pathlib import Path
from typing import Any

import torch

from finetune_trainer.data.batches import Rows, batches
from finetune_trainer.evaluation.evaluate import evaluate
from finetune_trainer.memory.plan import Plan
from finetune_trainer.methods.combinations import virtual_tokens
from finetune_trainer.methods.initialization import as_base, initialize
from finetune_trainer.objectives.objective import make_objective
from finetune_trainer.objectives.reference import set_references
from finetune_trainer.runspec import RunSpec, Storage
from finetune_trainer.training.attention import NAME, register
from finetune_trainer.training.checkpoint import Snapshot
from finetune_trainer.training.distributed import World
from finetune_trainer.training.fit import Fit
from finetune_trainer.training.precision import choose_precision
from finetune_trainer.training.quantization import load_base_model
from finetune_trainer.training.shards import Shards

from .tiny import make_judged, make_pairs, make_rows, write_dataset

CPU = torch.device("cpu")
FP32 = choose_precision("FP32", "cpu", False)


class Setup:
    """What a run needs, around a tiny model: rows of its objective, and some more that are held out."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        spec: Any,
        snapshot: Snapshot | None = None,
        steps: int = 8,
        micro_batch: int = 4,
        layout: str = "flat",
        world: World = World(),  # noqa: B008  # it is frozen
        shared: bool = False,
        counts: tuple[int, int] | None = None,
    ) -> None:
        """`shared`: the base model is shared out over the world's processes. `counts`: rows, and those held out."""
        kind = spec.objective.type
        make, count = {"SFT": (make_rows, 24), "KTO": (make_judged, 6)}.get(kind, (make_pairs, 6))
        count, held_out = counts or (count, 5)
        dataset = write_dataset(folder / "data", make(count), make(held_out, seed=1))
        self.rows, self.held_out = (Rows(dataset, split, folder / "scratch") for split in ("train", "evaluation"))
        shards = Shards(world, CPU) if shared else None
        base = load_base_model(model, spec, FP32, CPU, shards)
        if virtual_tokens(spec) or kind == "Reward":
            layout = "padded"
        if layout == "flat":
            register()
            base.set_attn_implementation(NAME)
        self.objective = make_objective(spec, layout, CPU, FP32)
        first = batches(self.rows, 4, layout, CPU) if kind == "SFT" else iter(())
        self.model, self.initial = initialize(base, spec, steps, model, first, snapshot, shards)
        splits = {"train": self.rows, "evaluation": self.held_out}
        used = {split: (rows, list(range(len(rows)))) for split, rows in splits.items()}
        self.reference = set_references(
            self.model, self.initial, self.objective, used, micro_batch, world, CPU, snapshot
        )
        plan = Plan(steps, spec.training.batch_size, micro_batch, len(self.rows))
        self.fit = Fit(
            spec, self.model, self.objective, self.rows, plan, world, CPU,
            initial=self.initial, reference=self.reference,
        )  # fmt: skip
        if snapshot:
            self.fit.resume(snapshot)
        self.model.train()

    def run(self, steps: int) -> list[float]:
        for _ in range(steps):
            self.fit.step()
        return [line["loss"] for line in self.fit.state.metrics]

    def loss(self) -> float:
        """Over all training rows."""
        return self.measure(self.rows)["loss"]

    def measure(self, rows: Rows) -> dict[str, float]:
        """The objective's metrics."""
        return evaluate(self.model, self.objective, rows, self.fit.plan.micro_batch, self.fit.world, CPU)


def run_spec(spec: Any) -> RunSpec:
    return RunSpec(
        stage="train", namespace="demo", name="tiny", job="tiny", spec=spec, storage=Storage(uri="s3://finetune")
    )


@torch.no_grad()
def logits(model: Any, initial: Any = None, base: bool = False) -> torch.Tensor:
    """Logits of one unpacked sample, by the model's own attention."""
    model.eval()
    network = model.get_base_model()
    before = network.config._attn_implementation
    network.set_attn_implementation("sdpa")
    ids = torch.arange(5, 25)[None]
    if base:
        with as_base(model, initial or {}):
            found = model(input_ids=ids).logits
    else:
        found = model(input_ids=ids).logits
    network.set_attn_implementation(before)
    model.train()
    return found[:, -20:].float()
