"""Tokens per second and peak memory on one NVIDIA GPU, beside our estimate: LoRA, QLoRA and full training at 1B to 8B.

    python bench/gpu.py [--models 1B,3B,8B] [--methods LoRA,QLoRA,Full] [--length 1024] [--json FILE]
    python bench/gpu.py --smoke     # a tiny model on the CPU: the whole path, no figures worth reading

One file that runs from a checkout with nothing installed but what the trainer image holds (torch, transformers, peft,
bitsandbytes). Weights are random and made on the GPU, so nothing is downloaded: speed and memory do not depend on what
they are. LoRA and QLoRA are trained by the trainer's own loop; full training, which the product does not do, by the same
loss with bf16 weights and AdamW. Peak memory is what the device gave away at most, CUDA context included, as nvidia-smi
shows it. Ends with 1 when a peak is more than 10 % away from the estimate.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "operator"), str(ROOT / "trainer_image")]

GIB = 1 << 30
TOLERANCE = 0.10
WARM_UP = 2
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "num_key_value_heads": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "1B": {  # Llama-3.2-1B
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "tie_word_embeddings": True,
    },
    "3B": {  # Llama-3.2-3B
        **LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "tie_word_embeddings": True,
    },
    "8B": {  # Llama-3.1-8B
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "tie_word_embeddings": False,
    },
    "tiny": {
        **LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False,
    },
}  # fmt: skip
METHODS = ("LoRA", "QLoRA", "Full")


@dataclass(frozen=True)
class Case:
    model: str
    method: str
    length: int
    batch: int
    steps: int


@dataclass
class Measured:
    """One case on one device. Sizes in bytes; `estimate` and `apart` are None where there is none."""

    model: str
    method: str
    micro_batch: int
    checkpointing: bool
    tokens_per_second: float
    loss: float
    peak: int | None
    estimate: float | None

    @property
    def apart(self) -> float | None:
        """How far the estimate is from the peak, as a share of the peak."""
        return self.estimate / self.peak - 1 if self.peak and self.estimate else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="1B,3B,8B", help=f"of {', '.join(MODELS)} (default: 1B,3B,8B)")
    parser.add_argument("--methods", default=",".join(METHODS), help="of LoRA, QLoRA and Full (default: all)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of every sample (default: 1024)")
    parser.add_argument("--batch", type=int, default=8, help="samples per optimizer step (default: 8)")
    parser.add_argument("--steps", type=int, default=10, help=f"measured steps, after {WARM_UP} others (default: 10)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args(argv)
    if options.smoke:
        options.models, options.length, options.batch, options.steps = "tiny", 32, 2, 2
    if unknown := {*options.models.split(",")} - {*MODELS} | {*options.methods.split(",")} - {*METHODS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")

    import torch

    from finetune_trainer.training import startup

    if not options.smoke and not torch.cuda.is_available():
        parser.error("torch sees no NVIDIA GPU; --smoke runs on the CPU")
    startup.import_libraries(processes=1)
    device = torch.device("cpu" if options.smoke else "cuda:0")
    name = "CPU" if options.smoke else torch.cuda.get_device_name(device)
    print(
        f"{name}, torch {torch.__version__}, samples of {options.length} tokens, {options.batch} per step", flush=True
    )
    results = []
    for model in options.models.split(","):
        for method in options.methods.split(","):
            case = Case(model, method, options.length, options.batch, options.steps)
            try:
                results.append(measure(case, device))
                print(line(results[-1]), flush=True)
            except torch.OutOfMemoryError:
                print(f"{model:5} {method:6} does not fit in the memory of this GPU", flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for text in ratios(results):
        print(text)
    if options.json:
        found = [{**asdict(result), "apart": result.apart} for result in results]
        options.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "cases": found}, indent=1))
    return int(any(result.apart is not None and abs(result.apart) > TOLERANCE for result in results))


# ---- one case --------------------------------------------------------------------------------------------------------


def measure(case: Case, device: Any) -> Measured:
    """Train a few steps; raises torch.OutOfMemoryError."""
    import torch

    from finetune_trainer.memory.architecture import architecture
    from finetune_trainer.memory.estimate import Workload, estimate
    from finetune_trainer.memory.plan import choose_micro_batch
    from finetune_trainer.objectives.objective import make_objective
    from finetune_trainer.training.device import use_gradient_checkpointing
    from finetune_trainer.training.layout import choose_layout
    from finetune_trainer.training.precision import choose_precision

    spec = finetune(case)
    precision = choose_precision(spec.training.precision, device.type, True)
    model = random_model(case, device)
    shape = architecture(MODELS[case.model])
    assert shape
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    micro_batch, checkpointing = choose_micro_batch(run_spec(spec), shape, case.batch, memory)
    if case.method == "Full":
        micro_batch, checkpointing = 1, True  # the estimate knows adapters only
    micro_batch = min(micro_batch, case.batch)
    layout = choose_layout(model, spec)
    objective = make_objective(spec, layout, device, precision)
    use_gradient_checkpointing(model, spec, checkpointing)
    rows = [random_row(case.length, number) for number in range(case.batch)]
    make_step = full_training if case.method == "Full" else adapter_training
    step = make_step(case, spec, model, objective, rows, micro_batch, device)
    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun, losses = time.perf_counter(), [step() for _ in range(case.steps)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    expected = None
    if case.method != "Full":
        expected = estimate(shape, Workload(spec, case.length), micro_batch, checkpointing).expected
    speed = case.steps * case.batch * case.length / seconds
    peak = peak_memory(device)
    return Measured(case.model, case.method, micro_batch, checkpointing, speed, losses[-1], peak, expected)


def finetune(case: Case) -> Any:
    from finetune_operator.api.finetune import FineTuneSpec

    return FineTuneSpec.model_validate(
        {
            "baseModel": {"s3": {"uri": "s3://random/weights"}},
            "dataset": {"train": {"s3": {"uri": "s3://random/tokens"}}},
            "method": {"type": "LoRA" if case.method == "Full" else case.method},
            "training": {
                "maxSteps": WARM_UP + case.steps,
                "batchSize": case.batch,
                "maxLength": case.length,
                "packing": "Disabled",
                "precision": "BF16",
            },
        }
    )


def run_spec(spec: Any) -> Any:
    from finetune_trainer.runspec import RunSpec, Storage

    storage = Storage(uri="s3://random")
    return RunSpec(stage="train", namespace="bench", name="gpu", job="gpu", spec=spec, storage=storage)


def random_model(case: Case, device: Any) -> Any:
    """The frozen base model with random weights, on the device, its blocks in NF4 for QLoRA."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODELS[case.model])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.config.use_cache = False
    if case.method == "QLoRA":
        quantize(model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return model


def quantize(model: Any) -> None:
    """Linear layers but the head to NF4 with double quantization, one after the other, as loading with bitsandbytes does."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    from finetune_trainer.training.quantization import keep_packing_out

    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not head]
    for name in linears:
        parent = model.get_submodule(name.rpartition(".")[0])
        old = model.get_submodule(name)
        new = Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        weight = Params4bit(old.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        new.weight = weight.to(old.weight.device)
        setattr(parent, name.rpartition(".")[2], new)
    # What loading from files sets: PEFT looks at it to choose the layers' class.
    model.is_loaded_in_4bit = True
    if next(model.parameters()).device.type == "cpu":
        keep_packing_out(model)


def random_row(length: int, seed: int) -> Any:
    """A row of one sample, all of it learned: the most that the estimate has to cover."""
    import numpy as np

    from finetune_trainer.data.batches import Row

    ids = np.random.default_rng(seed).integers(0, 500, length).astype(np.int32)
    return Row(ids, ids.copy(), np.array([length], np.int32))


Step = Callable[[], float]


def adapter_training(
    case: Case, spec: Any, model: Any, objective: Any, rows: list[Any], micro_batch: int, device: Any
) -> Step:
    """The trainer's own step."""
    from finetune_trainer.memory.plan import Plan
    from finetune_trainer.methods.initialization import initialize
    from finetune_trainer.training.distributed import World
    from finetune_trainer.training.fit import Fit

    steps = WARM_UP + case.steps
    plan = Plan(steps=steps, batch_size=case.batch, micro_batch=micro_batch, rows=len(rows))
    wrapped, initial = initialize(model, spec, steps, Path(), iter(()), None)
    fit = Fit(spec, wrapped, objective, rows, plan, World(), device, initial=initial)  # type: ignore[arg-type]
    wrapped.train()

    def step() -> float:
        fit.step()
        return fit.state.last_loss or 0.0

    return step


def full_training(
    case: Case, spec: Any, model: Any, objective: Any, rows: list[Any], micro_batch: int, device: Any
) -> Step:
    """Every weight trained in bf16: 8 bytes each with gradient and AdamW's memory."""
    import torch

    from finetune_trainer.objectives.objective import batch_totals
    from finetune_trainer.training.distributed import World

    model.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")

    def step() -> float:
        chunks = [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]
        totals = batch_totals(objective, model, chunks, World(), device)
        loss = sum(float(objective.backward(model, chunk, totals, 1.0, device)) for chunk in chunks)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def peak_memory(device: Any) -> int | None:
    """What the allocator held at most, and what the device gave away besides (context, libraries); None on a CPU."""
    import torch

    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    besides = total - free - torch.cuda.memory_reserved(device)
    return int(torch.cuda.max_memory_reserved(device) + besides)


# ---- what is printed -------------------------------------------------------------------------------------------------


def line(result: Measured) -> str:
    recompute = "checkpointing" if result.checkpointing else "no checkpointing"
    text = (
        f"{result.model:5} {result.method:6}{result.tokens_per_second:>9.0f} tokens/s  micro batch {result.micro_batch}, "
        f"{recompute}, loss {result.loss:.3f}"
    )
    if result.peak:
        text += f", peak {result.peak / GIB:.1f} GiB"
    if result.apart is not None and result.estimate:
        text += f", estimate {result.estimate / GIB:.1f} GiB ({result.apart:+.0%})"
    return text


def ratios(results: list[Measured]) -> list[str]:
    """Speed and memory of LoRA and QLoRA over those of full training of the same model."""
    full = {result.model: result for result in results if result.method == "Full"}
    lines = []
    for result in results:
        base = full.get(result.model)
        if base is None or result is base:
            continue
        text = f"{result.model} {result.method}: {result.tokens_per_second / base.tokens_per_second:.2f}x the tokens/s of full training"
        if result.peak and base.peak:
            text += f", {result.peak / base.peak:.2f}x its memory"
        lines.append(text)
    return lines


if __name__ == "__main__":
    sys.exit(main())
