"""The training loop on a model in memory: early stopping, checkpoints by step and epoch, the method's own state."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.attention import NAME, register
from finetune_trainer.checkpoint import Snapshot, read, write
from finetune_trainer.data import Rows
from finetune_trainer.distributed import World
from finetune_trainer.evaluate import evaluate
from finetune_trainer.fit import CheckpointClock, Fit, evaluation_interval
from finetune_trainer.initialization import as_base, initialize
from finetune_trainer.objectives import make_objective
from finetune_trainer.plan import Plan
from finetune_trainer.precision import choose_precision
from finetune_trainer.quantization import load_base_model

from .tiny import finetune_spec, make_rows, write_dataset

CPU = torch.device("cpu")


class Setup:
    """What a run needs, around a tiny model."""

    def __init__(self, folder: Path, model: Path, spec: Any, snapshot: Snapshot | None = None, steps: int = 8) -> None:
        precision = choose_precision("FP32", "cpu", False)
        self.rows = Rows(write_dataset(folder / "data", make_rows(24)), "train", folder / "scratch")
        base = load_base_model(model, spec, precision, CPU)
        virtual = spec.method.type in ("PrefixTuning", "PromptTuning", "PTuning")
        if not virtual:
            register()
            base.set_attn_implementation(NAME)
        objective = make_objective(spec, "padded" if virtual else "flat", CPU, precision)
        batches = iter([])
        if spec.method.lora.initialization == "EVA":
            from finetune_trainer.data import batches as all_batches

            batches = all_batches(self.rows, 4, "flat", CPU)
        self.model, self.initial = initialize(base, spec, steps, model, batches, snapshot)
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


def test_early_stopping_ends_the_run_and_goes_back_to_the_best_weights(tmp_path: Path, tiny_llama: Path) -> None:
    spec = finetune_spec(training={"earlyStopping": {"patience": 2}}, checkpoint={"every": 1})
    fit = Setup(tmp_path, tiny_llama, spec).fit
    losses, seen = iter([3.0, 2.0, 2.5, 2.1, 0.5]), []

    def evaluate() -> float:
        seen.append({name: parameter.detach().clone() for name, parameter in fit.parameters.items()})
        return next(losses)

    assert fit.run(lambda snapshot: None, lambda: None, lambda: False, evaluate)
    assert fit.state.step == 4
    assert all(torch.equal(parameter, seen[1][name]) for name, parameter in fit.parameters.items())


def test_an_interrupted_run_saves_a_checkpoint_and_says_that_it_is_not_done(tmp_path: Path, tiny_llama: Path) -> None:
    fit = Setup(tmp_path, tiny_llama, finetune_spec(checkpoint={"every": 1000})).fit
    saved: list[int] = []
    assert not fit.run(lambda snapshot: saved.append(snapshot.state.step), lambda: None, lambda: fit.state.step == 3)
    assert saved == [3]


@pytest.mark.parametrize("every", [2, "epoch", "10m"])
def test_checkpoints_are_due_by_step_epoch_or_time(every: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = CheckpointClock(every, Plan(steps=100, batch_size=4, micro_batch=4, rows=10), step=0)
    due = []
    for step in range(1, 7):
        now[0] += 250
        if clock(step):
            due.append(step)
    assert due == {2: [2, 4, 6], "epoch": [3, 5], "10m": [3, 6]}[every]


def test_early_stopping_never_depends_on_time() -> None:
    plan = Plan(steps=100, batch_size=4, micro_batch=4, rows=10)
    intervals = [evaluation_interval(finetune_spec(checkpoint={"every": every}), plan) for every in (7, "epoch", "10m")]
    assert intervals == [7, 3, 10]


LORA = {"rank": 4, "alpha": 8}
METHODS: dict[str, dict[str, Any]] = {
    "rslora": {"type": "LoRA", "lora": LORA | {"useRslora": True}},
    "dora": {"type": "LoRA", "lora": LORA | {"useDora": True}},
    "dora on nf4": {"type": "QLoRA", "lora": LORA | {"useDora": True}},
    "gaussian": {"type": "LoRA", "lora": LORA | {"initialization": "Gaussian"}},
    "pissa": {"type": "LoRA", "lora": LORA | {"initialization": "PiSSA"}},
    "pissa with rslora": {"type": "LoRA", "lora": LORA | {"initialization": "PiSSA", "useRslora": True}},
    "olora": {"type": "LoRA", "lora": LORA | {"initialization": "OLoRA"}},
    "eva": {"type": "LoRA", "lora": LORA | {"initialization": "EVA", "targetModules": ["q_proj"]}},
    "loftq": {"type": "QLoRA", "lora": LORA | {"initialization": "LoftQ"}},
    "lora+": {"type": "LoRA", "lora": LORA | {"loraPlusRatio": 16}},
    "patterns": {"type": "LoRA", "lora": LORA | {"rankPattern": {"q_proj": 8}, "alphaPattern": {"q_proj": 4}}},
    "one layer": {"type": "LoRA", "lora": LORA | {"layersToTransform": [1]}},
    "regex": {"type": "LoRA", "lora": LORA | {"targetModules": [r".*\.(q|v)_proj"], "excludeModules": ["v_proj"]}},
    "whole head": {"type": "LoRA", "lora": LORA | {"modulesToSave": ["lm_head"]}},
    "bias": {"type": "LoRA", "lora": LORA | {"bias": "LoraOnly"}},
    "fp4": {"type": "QLoRA", "quantization": {"type": "FP4"}, "lora": LORA},
    "int8": {"type": "LoRA", "quantization": {"type": "INT8"}, "lora": LORA},
    "adalora": {"type": "AdaLoRA", "adaLora": {"initialRank": 6, "targetRank": 3}},
    "adalora on nf4": {"type": "AdaLoRA", "quantization": {"type": "NF4"}},
    "ia3": {"type": "IA3"},
    "ia3 on nf4": {"type": "IA3", "quantization": {"type": "NF4"}},
    "prefix": {"type": "PrefixTuning", "virtualTokens": {"count": 4}},
    "prefix with projection": {"type": "PrefixTuning", "virtualTokens": {"count": 4, "projection": True}},
    "prompt": {"type": "PromptTuning", "virtualTokens": {"count": 4}},
    "prompt from text": {"type": "PromptTuning", "virtualTokens": {"count": 6, "initText": "alpha beta"}},
    "p-tuning": {"type": "PTuning", "virtualTokens": {"count": 4}},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_resumes_bitwise(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    spec = finetune_spec(method=METHODS[name], training={"learningRate": 0.02})
    whole = Setup(tmp_path / "whole", tiny_llama, spec)
    before = whole.loss()
    whole.run(4)
    write(whole.fit.snapshot().on_cpu(), tmp_path / "step-4")
    losses = whole.run(4)
    assert whole.loss() < before

    resumed = Setup(tmp_path / "resumed", tiny_llama, spec, snapshot=read(tmp_path / "step-4"))
    # Every run computes without training before its first step (layout.py measures the isolation of samples), and
    # INT8 layers of bitsandbytes compute differently from then on.
    resumed.loss()
    assert resumed.run(4) == losses
    for parameter, other in zip(whole.fit.parameters.values(), resumed.fit.parameters.values(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("name", METHODS)
def test_every_adapter_reloads_on_a_fresh_base_with_the_same_logits(
    name: str, tmp_path: Path, tiny_llama: Path
) -> None:
    from peft import PeftModel

    from finetune_trainer.adapter import write_adapter

    spec = finetune_spec(method=METHODS[name], training={"learningRate": 0.02})
    setup = Setup(tmp_path, tiny_llama, spec)
    before = logits(setup.model, setup.initial, base=True)
    setup.run(4)
    write_adapter(setup.model, run_spec(spec), tmp_path / "adapter", setup.initial)
    trained, base = logits(setup.model, setup.initial), logits(setup.model, setup.initial, base=True)
    if spec.method.lora.bias == "None":
        assert torch.allclose(base, before, atol=1e-5)

    fresh = load_base_model(tiny_llama, spec, choose_precision("FP32", "cpu", False), CPU)
    reloaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    assert torch.allclose(logits(reloaded), trained, atol=1e-4), (logits(reloaded) - trained).abs().max()
    assert not torch.allclose(trained, base, atol=1e-3)


def run_spec(spec: Any) -> Any:
    from finetune_trainer.runspec import RunSpec, Storage

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
