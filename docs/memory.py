"""The tables of docs/memory.md: what the estimate says of well-known models, beside the figures that people pass on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.memory.architecture import Architecture, architecture, read_config
from finetune_trainer.memory.estimate import Part, Workload, estimate
from finetune_trainer.memory.trainable import trainable_parameters
from finetune_trainer.memory.verdict import verdict

SHAPES = Path(__file__).resolve().parent / "shapes"
GB = 1e9  # published figures are decimal
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LENGTH = 512


@dataclass(frozen=True)
class Claim:
    """A published figure in GB, and the range that it can mean. `least`, `most`: the methods that bound it."""

    model: str
    method: str
    published: str
    low: float
    high: float
    least: str
    most: str
    why: str = ""


CLAIMS = (
    Claim("llama-3.1-8b", "full", "60+", 60, 80, "full", "full",
          "with weights, gradients and Adam all in 16 bit; mixed precision with float32 copies takes twice that"),
    Claim("llama-3.1-8b", "LoRA r=16", "18", 18, 18, "LoRA, checkpointing", "LoRA"),
    Claim("llama-3.1-8b", "QLoRA r=16", "6", 6, 6, "QLoRA, checkpointing", "QLoRA",
          "weights and CUDA context take that; nothing is left to train with"),
    Claim("llama-3.1-8b", "IA3", "16", 16, 16, "IA3, checkpointing", "IA3",
          "the weights alone take that; activations and CUDA context come on top"),
    Claim("llama-2-7b", "full, fp16", "28+", 28, 40, "full", "full", "it counts weights and gradients, and no optimizer"),
    Claim("llama-2-7b", "INT8 + LoRA", "10", 10, 10, "INT8, checkpointing", "INT8"),
    Claim("llama-2-7b", "QLoRA", "4-5", 4, 5, "QLoRA, checkpointing", "QLoRA", "with checkpointing and short rows only"),
    Claim("llama-2-7b", "QLoRA, checkpointing", "3.5-4", 3.5, 4, "QLoRA, checkpointing", "QLoRA, checkpointing",
          "the weights alone take 3.9 GB"),
)  # fmt: skip
WEIGHTS = {"llama-2-7b": "~4", "llama-2-13b": "~8", "llama-3.1-70b": "~40"}
METHODS = ("full", "LoRA", "INT8", "QLoRA", "QLoRA, checkpointing", "IA3")


def shape(model: str) -> Architecture:
    found = architecture(read_config(SHAPES / model))
    assert found
    return found


def spec(method: str, **parts: Any) -> FineTuneSpec:
    """Rank 16 on q, k, v and o, as the published figures have it."""
    lora = {"rank": 16, "targetModules": ATTENTION}
    kind = method.removesuffix(", checkpointing")
    kinds: dict[str, Any] = {
        "LoRA": {"type": "LoRA", "lora": lora},
        "INT8": {"type": "LoRA", "lora": lora, "quantization": {"type": "INT8"}},
        "IA3": {"type": "IA3"},
    }
    source = {"s3": {"uri": "s3://models/shapes"}}
    training = {"precision": "BF16", "maxLength": LENGTH, "optimizer": "paged_adamw_32bit", **parts.pop("training", {})}
    return FineTuneSpec.model_validate(
        {
            "baseModel": source,
            "dataset": {"train": source},
            "method": kinds.get(kind, {"type": "QLoRA", "lora": lora}),
            "training": training,
            **parts,
        }
    )


def full(model: Architecture) -> tuple[float, float, float]:
    """Bytes of full fine-tuning's weights, gradients and optimizer: all in 16 bit; in mixed precision with AdamW.

    Rajbhandari et al. 2020 ("ZeRO"), section 3.1: 2 + 2 bytes in 16 bit, 4 + 4 + 4 for the float32 copy and Adam's two
    moments. A FineTune does not train like this.
    """
    return 8 * model.parameters, 16 * model.parameters, 16 * model.parameters


def band(model: str, method: str) -> tuple[float, float, float]:
    """(at least, expected, at most) in bytes for a micro batch of one row of 512 tokens."""
    if method == "full":
        return full(shape(model))
    found = estimate(shape(model), Workload(spec(method), LENGTH), 1, method.endswith("checkpointing"))
    return found.low, found.expected, found.high


def overview() -> str:
    """One row per model, one column per method."""
    rows = [f"| GB of one GPU: at least to at most | {' | '.join(METHODS)} |", "|---|" + "---|" * len(METHODS)]
    for path in sorted(SHAPES.iterdir(), key=lambda path: shape(path.name).parameters):
        bands = [band(path.name, method) for method in METHODS]
        cells = [f"{low / GB:.0f} to {high / GB:.0f}" if low > 20 * GB else f"{low / GB:.1f} to {high / GB:.1f}"
                 for low, _, high in bands]  # fmt: skip
        rows.append(f"| {title(path.name)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def claims() -> str:
    """Each published figure with what it comes to."""
    rows = ["| model | method | published | estimate | |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        low, high = band(claim.model, claim.least)[0] / GB, band(claim.model, claim.most)[2] / GB
        found = "too low" if claim.high < low else "too high" if claim.low > high else "confirmed"
        told = f"{found}: {claim.why}" if claim.why else found
        rows.append(
            f"| {title(claim.model)} | {claim.method} | {claim.published} GB | {low:.1f} to {high:.1f} GB | {told} |"
        )
    return "\n".join(rows)


def weights() -> str:
    """Weights in NF4 with double quantization, and what the exact figure is made of."""
    rows = ["| model | parameters | published | NF4 weights | of these quantization state |", "|---|---|---|---|---|"]
    for model, published in WEIGHTS.items():
        found = shape(model)
        state = found.linear_weights * (1 / 64 + 4 / (64 * 256))
        exact = estimate(found, Workload(spec("QLoRA"), LENGTH), 1, True).parts[0].expected
        told = "confirmed" if abs(exact / GB - float(published[1:])) < 0.6 else "less than published"
        rows.append(
            f"| {title(model)} | {found.parameters:,} | {published} GB | {exact / GB:.2f} GB: {told} | {state / GB:.2f} GB |"
        )
    return "\n".join(rows)


def trained() -> str:
    """Exact counts of trained parameters."""
    rows = ["| model | rank | layers | trained parameters | |", "|---|---|---|---|---|"]
    for model, rank, targets, remark in (
        ("llama-3.1-8b", 16, ATTENTION, ""),
        ("llama-3.1-8b", 16, ["all-linear"], ""),
        ("llama-2-7b", 16, ATTENTION, "widely copied as 33,554,432, which is the count of rank 32"),
        ("llama-3.1-70b", 64, ["all-linear"], ""),
    ):
        found = shape(model)
        lora = {"type": "QLoRA", "lora": {"rank": rank, "targetModules": targets}}
        asked = FineTuneSpec.model_validate(spec("QLoRA").model_dump(by_alias=True) | {"method": lora})
        count = trainable_parameters(found, asked)
        names = "all linear" if targets != ATTENTION else "q, k, v, o"
        share = f"{100 * count / found.parameters:.2f} %"
        rows.append(f"| {title(model)} | {rank} | {names} | {count:,} ({share}) | {remark} |")
    return "\n".join(rows)


def formulas() -> str:
    """Every part of an estimate and where its formula comes from."""
    found = estimate(shape("llama-3.1-8b"), Workload(spec("QLoRA"), LENGTH), 1, True)
    plain = estimate(shape("llama-3.1-8b"), Workload(spec("LoRA"), LENGTH), 1, False)
    seen: dict[str, list[Part]] = {}
    shared = estimate(shape("llama-3.1-8b"), Workload(spec("QLoRA"), LENGTH, shards=2), 1, True)
    for part in (*found.parts, *plain.parts, *shared.parts[-2:-1]):
        known = seen.setdefault(part.name, [])
        if part.source not in [one.source for one in known]:
            known.append(part)
    rows = ["| part | bytes |", "|---|---|"]
    return "\n".join(
        rows + [f"| {name} | {'; or '.join(part.source for part in parts)} |" for name, parts in seen.items()]
    )


def seventy_on_24() -> str:
    """The verdict on 70B QLoRA on one GPU of 24 GB, as a FineTune's status says it."""
    asked = spec("QLoRA", resources={"gpuMemory": "24Gi"})
    found = verdict(shape("llama-3.1-70b"), Workload(asked, LENGTH))
    assert found.verdict == "DoesNotFit"
    return f"```text\ndoes not fit: {found.message}\n```"


def sharing() -> str:
    """What one GPU of several needs when they share the base model."""
    counts = (1, 2, 4, 8)
    rows = [
        f"| | {' | '.join('one GPU' if gpus == 1 else f'{gpus} GPUs' for gpus in counts)} |",
        "|---|" + "---|" * len(counts),
    ]
    for model in ("llama-3.1-8b", "llama-2-13b", "llama-3.1-70b"):
        for method in ("QLoRA", "LoRA"):
            works = [Workload(spec(method), LENGTH, shards=gpus) for gpus in counts]
            sizes = [estimate(shape(model), work, 1, True).expected / GB for work in works]
            rows.append(f"| {title(model)}, {method} | {' | '.join(f'{size:.1f}' for size in sizes)} |")
    return "\n".join(rows)


def title(model: str) -> str:
    """Llama-3.1-8B of llama-3.1-8b."""
    name, _, size = model.rpartition("-")
    return f"{name.capitalize()}-{size.upper()}"


SECTIONS = {
    "memory": overview, "claims": claims, "weights": weights, "trained": trained, "formulas": formulas,
    "seventy": seventy_on_24, "sharing": sharing,
}  # fmt: skip
