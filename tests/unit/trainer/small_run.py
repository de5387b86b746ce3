"""A run on a model in memory, without a bucket: what the loop's and the methods' tests share."""

from pathlib import Path
from typing import Any

import torch

from finetune_trainer.attention import NAME, register
from finetune_trainer.checkpoint import Snapshot
from finetune_trainer.combinations import virtual_tokens
from finetune_trainer.data import Rows, batches
from finetune_trainer.distributed import World
from finetune_trainer.evaluate import evaluate
from finetune_trainer.fit import Fit
from finetune_trainer.initialization import as_base, initialize
from finetune_trainer.objectives import make_objective
from finetune_trainer.plan import Plan
from finetune_trainer.precision import choose_precision
from finetune_trainer.quantization import load_base_model
from finetune_trainer.runspec import RunSpec, Storage

from .tiny import make_rows, write_dataset

CPU = torch.device("cpu")


class Setup:
    """What a run needs, around a tiny model."""

    def __init__(self, folder: Path, model: Path, spec: Any, snapshot: Snapshot | None = None, steps: int = 8) -> None:
        precision = choose_precision("FP32", "cpu", False)
        self.rows = Rows(write_dataset(folder / "data", make_rows(24)), "train", folder / "scratch")
        base = load_base_model(model, spec, precision, CPU)
        layout = "padded" if virtual_tokens(spec) else "flat"
        if layout == "flat":
            register()
            base.set_attn_implementation(NAME)
        objective = make_objective(spec, layout, CPU, precision)
        first = batches(self.rows, 4, layout, CPU)
        self.model, self.initial = initialize(base, spec, steps, model, first, snapshot)
        plan = Plan(steps, 4, 4, len(self.rows))
        self.objective = objective
        self.fit = Fit(spec, self.model, objective, self.rows, plan, World(), CPU, initial=self.initial)
        if snapshot:
            self.fit.resume(snapshot)

    def run(self, steps: int) -> list[float]:
        for _ in range(steps):
            self.fit.step()
        return [line["loss"] for line in self.fit.state.metrics]

    def loss(self) -> float:
        """Over all training rows."""
        return evaluate(self.model, self.objective, self.rows, 8, World(), CPU)["loss"]


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
