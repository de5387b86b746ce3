"""Whether a run fits the GPUs that it asks for, how the base model lies on them, and what would fit if it does not."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from pathlib import Path

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.finetunestatus import EstimateStatus, GPUMemoryEstimate
from finetune_trainer.memory.architecture import Architecture, architecture, read_config
from finetune_trainer.memory.estimate import GIB, Estimate, Workload, estimate, gib, longest_row, quantity
from finetune_trainer.methods.combinations import can_checkpoint, refusals, sharing_refusal
from finetune_trainer.methods.experts import adapts_experts
from finetune_trainer.methods.suitability import refuse_unsuitable

LARGEST = 256  # micro batches are not searched beyond this


def estimate_run(
    model: Path, spec: FineTuneSpec, parameters: int, row_tokens: int = 0, learned: float = 1.0
) -> EstimateStatus:
    """The estimate and verdict that status.estimate shows. UnsupportedCombination when the method does not suit the model."""
    config = read_config(model)
    shape = architecture(config)
    refuse_unsuitable(shape, spec, config, row_tokens)
    if adapts_experts(spec, config):
        return EstimateStatus(message="no estimate for a run that adapts experts; it may need any memory")
    if shape is None:
        return EstimateStatus(
            message=f"model type {config.get('model_type')!r} is not known to the estimate; the run may need any memory"
        )
    if spec.resources.gpus == 0:
        return EstimateStatus(message="no estimate for training on a CPU")
    work = Workload(spec, row_tokens or longest_row(spec), learned, parameters)
    return verdict(shape, work)


def verdict(shape: Architecture, work: Workload) -> EstimateStatus:
    """Whether it fits resources.gpuMemory, with which micro batch, and what would fit if it does not."""
    spec = work.spec
    asked = spec.training.micro_batch_size
    share = max(1, spec.training.batch_size // max(1, _gpus(spec)))
    if spec.resources.gpu_memory is None:
        chosen = _chosen(shape, work, 1 if asked == "auto" else int(asked), None)
        return _status(chosen, "Unknown", None, "set resources.gpuMemory to be told whether this fits")
    memory = quantity(spec.resources.gpu_memory)
    work = placed(shape, work, memory)
    fitting = [size for size in _sizes(share) if _chosen(shape, work, size, memory).high <= memory]
    if asked != "auto":
        chosen = _chosen(shape, work, int(asked), memory)
        if chosen.expected <= memory:
            return _fits(chosen, max([*fitting, int(asked)]), memory, work.shards)
    elif fitting:
        return _fits(_chosen(shape, work, max(fitting), memory), max(fitting), memory, work.shards)
    chosen = _chosen(shape, work, 1, memory)
    if chosen.expected <= memory:
        if asked == "auto":
            return _fits(chosen, 1, memory, work.shards)
        largest = max(fitting, default=1)
        smaller = f"training.microBatchSize: {asked} does not fit, {largest} does; the effective batch stays the same"
        return _status(_chosen(shape, work, largest, memory), "DoesNotFit", largest, smaller, work.shards)
    return _status(chosen, "DoesNotFit", 0, what_would_fit(shape, work, memory), work.shards)


def placed(shape: Architecture, work: Workload, memory: float) -> Workload:
    """The work as its GPUs take it: the base model whole on each where there is room for it with micro batch 1, else
    shared out over all of them where that takes less.
    """
    gpus = _gpus(work.spec)
    whole = _chosen(shape, replace(work, shards=1), 1, memory)
    if gpus < 2 or whole.expected <= memory or _sharing_refusal(shape, work.spec):
        return replace(work, shards=1)
    shared = replace(work, shards=gpus)
    return shared if estimate(shape, shared, 1, checkpointing=True).expected < whole.expected else work


def what_would_fit(shape: Architecture, work: Workload, memory: float) -> str:
    """The smallest changes that would make it fit, in words: each alone, beside those that all of them need."""
    spec, twice = work.spec, can_checkpoint(work.spec)
    least = estimate(shape, work, 1, twice)
    checkpointing = " and checkpointing" if least.checkpointing else ""
    shared = f", shared out over {work.shards} GPUs," if work.shards > 1 else ""
    text = f"needs about {gib(least.expected)}{shared} with micro batch 1{checkpointing}, one GPU has {gib(memory)}"
    weights = least.parts[0].expected
    if weights > memory:
        text += f" and the weights alone take {gib(weights)}"
    options = [
        *_shorter(shape, work, memory),
        *_quantized(shape, work, memory),
        *_more_gpus(shape, work, memory),
        f"a GPU with {ceil(estimate(shape, replace(work, shards=1), 1, twice).high / GIB)} GiB or more",
    ]
    text += f"; what would fit: {', or '.join(options)}"
    if needed := _needed_too(spec):
        text += f"; each with {' and '.join(needed)}"
    refusal = _sharing_refusal(shape, spec)
    return f"{text}; the GPUs cannot share the base model: {refusal}" if refusal and _gpus(spec) > 1 else text


def _needed_too(spec: FineTuneSpec) -> list[str]:
    """What the options are worked out with, and the spec forbids."""
    asked, needed = spec.training.micro_batch_size, []
    if asked != "auto" and int(asked) > 1:
        needed.append("training.microBatchSize: 1")
    if spec.training.gradient_checkpointing == "Disabled" and can_checkpoint(spec):
        needed.append("training.gradientCheckpointing: Auto")
    return needed


def _shorter(shape: Architecture, work: Workload, memory: float) -> list[str]:
    spec, length = work.spec, work.row_tokens
    while length > 256:
        length //= 2
        if estimate(shape, replace(work, row_tokens=length), 1, can_checkpoint(spec)).expected <= memory:
            return [f"training.maxLength: {length * spec.training.max_length // longest_row(spec)}"]
    return []


def _quantized(shape: Architecture, work: Workload, memory: float) -> list[str]:
    """The base model in 4 bit, where the rest of the spec can be trained so."""
    method = work.spec.method
    if method.quantization.type in ("NF4", "FP4"):
        return []
    data = work.spec.model_dump(by_alias=True)
    told = "method.quantization.type: NF4"
    data["method"]["quantization"] |= {"type": "NF4"}
    if method.type == "LoRA":
        told = "method.type: QLoRA" if method.quantization.type == "None" else f"method.type: QLoRA with {told}"
        data["method"]["type"] = "QLoRA"
    spec = FineTuneSpec.model_validate(data)
    if any(refusals(spec)):
        return []
    found = estimate(shape, replace(work, spec=spec), 1, can_checkpoint(spec))
    return [told] if found.expected <= memory else []


def _more_gpus(shape: Architecture, work: Workload, memory: float) -> list[str]:
    gpus = None if _sharing_refusal(shape, work.spec) else _gpus_that_fit(shape, work, memory)
    return [f"{gpus} GPUs that share the base model (resources.gpus x resources.nodes)"] if gpus else []


def _sharing_refusal(shape: Architecture, spec: FineTuneSpec) -> str | None:
    """Why the GPUs of a run could not share this base model; None: they can."""
    if shape.experts:
        return (
            f"baseModel: experts as those of a {shape.model_type} model are not shared out; use GPUs that hold it whole"
        )
    return sharing_refusal(spec)


def _gpus_that_fit(shape: Architecture, work: Workload, memory: float) -> int | None:
    """The fewest GPUs, more than now, that surely hold the base model together and share the batch evenly."""
    batch = work.spec.training.batch_size
    numbers = (gpus for gpus in range(_gpus(work.spec) + 1, batch + 1) if batch % gpus == 0)
    return next((n for n in numbers if estimate(shape, replace(work, shards=n), 1, True).high <= memory), None)


def _gpus(spec: FineTuneSpec) -> int:
    """All GPUs of a run."""
    return spec.resources.gpus * spec.resources.nodes


def _sizes(share: int) -> list[int]:
    """Micro batches worth trying: those that split a GPU's share of the batch evenly."""
    return [size for size in range(1, min(share, LARGEST) + 1) if share % size == 0]


def _chosen(shape: Architecture, work: Workload, micro_batch: int, memory: float | None) -> Estimate:
    """The estimate with or without checkpointing, as training.gradientCheckpointing says; Auto: only when it is "
    "needed."""
    asked = work.spec.training.gradient_checkpointing
    without = estimate(shape, work, micro_batch, checkpointing=False)
    if (
        asked == "Disabled"
        or not can_checkpoint(work.spec)
        or (asked == "Auto" and without.high <= (memory if memory is not None else 16 * GIB))
    ):
        return without
    return estimate(shape, work, micro_batch, checkpointing=True)


def _status(chosen: Estimate, verdict: str, largest: int | None, message: str, shards: int = 1) -> EstimateStatus:
    band = GPUMemoryEstimate(low=gib(chosen.low), expected=gib(chosen.expected), high=gib(chosen.high))
    return EstimateStatus.model_validate(
        {
            "gpuMemory": band,
            "verdict": verdict,
            "largestMicroBatch": largest,
            "gradientCheckpointing": chosen.checkpointing,
            "shards": shards if shards > 1 else None,
            "message": message,
        }
    )


def _fits(chosen: Estimate, largest: int, memory: float, shards: int) -> EstimateStatus:
    """The verdict with what it holds for, and how close it is."""
    how = f"with micro batch {chosen.micro_batch} and {'' if chosen.checkpointing else 'no '}gradient checkpointing"
    if shards > 1:
        how += f", the base model shared out over {shards} GPUs"
    text = f"{how}: about {gib(chosen.expected)}, at most {gib(chosen.high)}, of {gib(memory)}"
    if chosen.high > memory:
        text += "; it may run out of memory, and would then go on with a smaller micro batch"
    elif largest > chosen.micro_batch:
        text += f"; up to micro batch {largest} would fit"
    return _status(chosen, "Fits", largest, text, shards)
