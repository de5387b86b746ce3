"""Memory of one GPU that a run will need, from config.json alone, part by part, each with the source of its formula.

Known to the byte: weights, quantization state, adapter, optimizer. Estimated: activations, the allocator's waste, the
CUDA context; that is what the band from low to high is for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.finetunestatus import EstimateStatus, GPUMemoryEstimate
from finetune_trainer.architecture import Architecture, architecture, read_config
from finetune_trainer.combinations import can_checkpoint
from finetune_trainer.suitability import refuse_unsuitable
from finetune_trainer.trainable import trainable_parameters

GIB = 1 << 30
LARGEST = 256  # micro batches are not searched beyond this
PAIRS = frozenset({"DPO", "ORPO", "Reward"})
_LOSS_CHUNK = 1024  # positions whose float32 logits exist at once (loss.CHUNK)
_SUFFIXES = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTP", start=1)
}


@dataclass(frozen=True)
class Part:
    """One part of the memory: bytes at least, expected and at most, and where the formula comes from."""

    name: str
    low: float
    expected: float
    high: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """All parts for one micro batch."""

    parts: tuple[Part, ...]
    trainable: int
    micro_batch: int
    checkpointing: bool

    @property
    def low(self) -> float:
        return sum(part.low for part in self.parts)

    @property
    def expected(self) -> float:
        return sum(part.expected for part in self.parts)

    @property
    def high(self) -> float:
        return sum(part.high for part in self.parts)


@dataclass(frozen=True)
class Workload:
    """What of a run memory depends on, besides the model. `row_tokens`: of the longest row, both texts of a pair
    together; `learned`: share of its tokens.
    """

    spec: FineTuneSpec
    row_tokens: int
    learned: float = 1.0
    parameters: int = 0  # as counted in the weights' headers, 0: by the architecture


def estimate_run(
    model: Path, spec: FineTuneSpec, parameters: int, row_tokens: int = 0, learned: float = 1.0
) -> EstimateStatus:
    """The estimate and verdict that status.estimate shows. UnsupportedCombination when the method does not suit the model."""
    config = read_config(model)
    shape = architecture(config)
    refuse_unsuitable(shape, spec, config, row_tokens)
    if shape is None:
        return EstimateStatus(
            message=f"model type {config.get('model_type')!r} is not known to the estimate; the run may need any memory"
        )
    if spec.resources.gpus == 0:
        return EstimateStatus(message="no estimate for training on a CPU")
    work = Workload(spec, row_tokens or longest_row(spec), learned, parameters)
    return verdict(shape, work)


def longest_row(spec: FineTuneSpec) -> int:
    """Tokens of the longest row: a pair is two texts, each with the prompt, that are computed together."""
    return spec.training.max_length * (2 if spec.objective.type in PAIRS else 1)


def verdict(shape: Architecture, work: Workload) -> EstimateStatus:
    """Whether it fits resources.gpuMemory, with which micro batch, and what would fit if it does not."""
    spec = work.spec
    asked = spec.training.micro_batch_size
    share = max(1, spec.training.batch_size // max(1, _gpus(spec)))
    if spec.resources.gpu_memory is None:
        chosen = _chosen(shape, work, 1 if asked == "auto" else int(asked), None)
        return _status(chosen, "Unknown", None, "set resources.gpuMemory to be told whether this fits")
    memory = quantity(spec.resources.gpu_memory)
    fitting = [size for size in _sizes(share) if _chosen(shape, work, size, memory).high <= memory]
    if asked != "auto":
        chosen = _chosen(shape, work, int(asked), memory)
        if chosen.expected <= memory:
            return _fits(chosen, max([*fitting, int(asked)]), memory)
    elif fitting:
        return _fits(_chosen(shape, work, max(fitting), memory), max(fitting), memory)
    chosen = _chosen(shape, work, 1, memory)
    if chosen.expected <= memory:
        if asked == "auto":
            return _fits(chosen, 1, memory)
        largest = max(fitting, default=1)
        smaller = f"training.microBatchSize: {asked} does not fit, {largest} does; the effective batch stays the same"
        return _status(_chosen(shape, work, largest, memory), "DoesNotFit", largest, smaller)
    return _status(chosen, "DoesNotFit", 0, what_would_fit(shape, work, memory))


def what_would_fit(shape: Architecture, work: Workload, memory: float) -> str:
    """The smallest changes that would make it fit, in words."""
    spec, twice = work.spec, can_checkpoint(work.spec)
    least = estimate(shape, work, 1, twice)
    checkpointing = " and checkpointing" if twice else ""
    text = f"needs about {gib(least.expected)} with micro batch 1{checkpointing}, one GPU has {gib(memory)}"
    weights = least.parts[0].expected
    if weights > memory:
        text += f" and the weights alone take {gib(weights)}"
    options: list[str] = []
    length = work.row_tokens
    while length > 256:
        length //= 2
        if estimate(shape, replace(work, row_tokens=length), 1, twice).expected <= memory:
            options.append(f"training.maxLength: {length * spec.training.max_length // longest_row(spec)}")
            break
    if spec.method.quantization.type not in ("NF4", "FP4"):
        data = spec.model_dump(by_alias=True)
        data["method"] |= {"type": "QLoRA", "quantization": {"type": "NF4"}}
        if (
            estimate(shape, replace(work, spec=FineTuneSpec.model_validate(data)), 1, checkpointing=True).expected
            <= memory
        ):
            options.append("method.type: QLoRA")
    options.append(f"a GPU with {ceil(least.high / GIB)} GiB or more")
    # More GPUs share the batch, not the model.
    sharding = "; every GPU holds the whole base model: sharding it over GPUs is not supported yet"
    return f"{text}; what would fit: {', or '.join(options)}{sharding if _gpus(spec) > 1 else ''}"


def _gpus(spec: FineTuneSpec) -> int:
    """All GPUs of a run."""
    return spec.resources.gpus * spec.resources.nodes


def estimate(shape: Architecture, work: Workload, micro_batch: int, checkpointing: bool) -> Estimate:
    """Bytes on one GPU, part by part, for one micro batch."""
    spec = work.spec
    trained = trainable_parameters(shape, spec)
    tokens = micro_batch * work.row_tokens
    parts: tuple[Part, ...] = (
        _weights(shape, work),
        _exact("adapter and gradients", 8 * trained, "float32 weights and gradients (PEFT's default)"),
        _optimizer(spec.training.optimizer, trained),
        _activations(shape, spec, tokens, checkpointing),
        _logits(shape, spec, tokens, work.learned),
        _working(shape, spec),
        Part(
            "CUDA context",
            0.35 * GIB,
            0.55 * GIB,
            0.9 * GIB,
            "context, cuBLAS workspaces and kernels, as nvidia-smi shows them",
        ),
    )
    if spec.objective.type in ("DPO", "KTO"):
        # Rafailov et al. 2023 hold a second model; with an adapter the frozen weights are that model (TRL does the same)
        parts = (*parts, _exact("reference model", 0, "the base with its adapter off, before the first step"))
    grown = sum(part.expected for part in parts[3:5])
    waste = Part(
        "allocator",
        0,
        0.04 * grown,
        0.25 * grown + 0.2 * GIB,
        "what PyTorch's caching allocator reserves and cannot use",
    )
    return Estimate((*parts, waste), trained, micro_batch, checkpointing)


def _weights(shape: Architecture, work: Workload) -> Part:
    quantization, total = work.spec.method.quantization, work.parameters or shape.parameters
    linear = shape.linear_weights
    other = max(0, total - linear)
    full = 4 if work.spec.training.precision == "FP32" else 2
    if quantization.type in ("NF4", "FP4"):
        # QLoRA (Dettmers et al. 2023), section 3: half a byte, and per 64 weights a constant of 8 bit with one of 32
        # bit per 256 of
        # those, or one of 32 bit when not double-quantized. Equal to what bitsandbytes allocates (notes: 69,019,392
        # measured).
        state = 1 / 64 + 4 / (64 * 256) if quantization.double_quant else 4 / 64
        return _exact(
            "weights",
            linear * (0.5 + state) + other * full,
            f"{quantization.type}: half a byte and a constant per 64 weights (Dettmers et al. 2023); the rest {8 * full} bit",
        )
    if quantization.type == "INT8":
        scales = 4 * shape.layers * sum(layer.outputs for layer in shape.linears)
        return _exact(
            "weights",
            linear + scales + other * full,
            "LLM.int8(): a byte, and a float32 scale per row (Dettmers et al. 2022)",
        )
    return _exact("weights", total * full, f"{8 * full} bit per parameter")


def _optimizer(name: str, trained: int) -> Part:
    per_parameter = {
        "adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_32bit": 8,
        "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256,
        "lion_8bit": 1 + 4 / 256, "adafactor": 0.1, "sgd": 0,
    }[name]  # fmt: skip
    size = trained * per_parameter
    source = f"{name}: {per_parameter:g} bytes per trained parameter, as torch and bitsandbytes allocate them"
    return Part("optimizer", 0 if name.startswith("paged") else size, size, size, source)


def _activations(shape: Architecture, spec: FineTuneSpec, tokens: int, checkpointing: bool) -> Part:
    """What a forward pass keeps for the backward one.

    After Korthikanti et al. 2022 ("Reducing Activation Recomputation"), section 4, recounted for RMSNorm, gated MLP,
    grouped keys, attention that keeps no scores, and frozen weights (whose inputs need not be kept; a LoRA target keeps
    its own copy).
    """
    width = 4 if spec.training.precision == "FP32" else 2
    lora = spec.method.lora
    gated = any(linear.name in ("gate_proj", "gate_up_proj") for linear in shape.linears)
    block = 2 * 4 * shape.hidden  # two norms compute in float32
    block += width * 2 * (shape.query + shape.key_value)  # query, key, value, attention's output
    block += width * (3 if gated else 2) * shape.intermediate
    if spec.method.type in ("QLoRA", "LoRA", "AdaLoRA"):
        asked = spec.method.ada_lora.target_modules if spec.method.type == "AdaLoRA" else lora.target_modules
        rank = spec.method.ada_lora.initial_rank if spec.method.type == "AdaLoRA" else lora.rank
        mask = 1 if (spec.method.ada_lora.dropout if spec.method.type == "AdaLoRA" else lora.dropout) else 0
        copies = sum(
            (width + mask) * linear.inputs + width * 2 * rank
            for _, linear in shape.targets(asked, lora.exclude_modules)
        )
        block += copies // shape.layers
    if checkpointing:
        kept = shape.layers * width * shape.hidden + block
        source = "checkpointing: each block's input, and one block computed again (Chen et al. 2016)"
    else:
        kept, source = shape.layers * block, "every block (Korthikanti et al. 2022, recounted for frozen weights)"
    size = tokens * kept
    return Part("activations", 0.8 * size, size, 1.15 * size, source)


def _logits(shape: Architecture, spec: FineTuneSpec, tokens: int, learned: float) -> Part:
    """Logits exist for learned positions only; their gradient takes their place, float32 exists for one chunk at a
    time. Both answers of a pair have theirs at once, and ORPO learns the chosen one's prompt too.
    """
    if spec.objective.type == "Reward":
        return _exact("logits", 0, "one score per text")
    if spec.objective.type == "ORPO":
        learned = (1 + learned) / 2
    chunk = min(tokens, _LOSS_CHUNK) * shape.vocabulary * 4 * 2

    def size(share: float) -> float:
        return tokens * share * shape.vocabulary * 2 + chunk

    return Part(
        "logits",
        size(learned) / 2,
        size(learned),
        size(1.0),
        "learned positions x vocabulary x 2 bytes, and one chunk in float32",
    )


def _working(shape: Architecture, spec: FineTuneSpec) -> Part:
    largest = max(linear.weights for linear in shape.linears)
    if spec.method.quantization.type in ("NF4", "FP4"):
        return _exact("dequantized layer", 2 * largest, "the largest linear layer, expanded while it computes")
    return Part("working memory", 0, largest, 2 * largest, "temporaries of the largest linear layer")


def _exact(name: str, size: float, source: str) -> Part:
    return Part(name, size, size, size, source)


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


def _status(chosen: Estimate, verdict: str, largest: int | None, message: str) -> EstimateStatus:
    band = GPUMemoryEstimate(low=gib(chosen.low), expected=gib(chosen.expected), high=gib(chosen.high))
    return EstimateStatus.model_validate(
        {
            "gpuMemory": band,
            "verdict": verdict,
            "largestMicroBatch": largest,
            "gradientCheckpointing": chosen.checkpointing,
            "message": message,
        }
    )


def _fits(chosen: Estimate, largest: int, memory: float) -> EstimateStatus:
    """The verdict with what it holds for, and how close it is."""
    how = f"with micro batch {chosen.micro_batch} and {'' if chosen.checkpointing else 'no '}gradient checkpointing"
    text = f"{how}: about {gib(chosen.expected)}, at most {gib(chosen.high)}, of {gib(memory)}"
    if chosen.high > memory:
        text += "; it may run out of memory, and would then go on with a smaller micro batch"
    elif largest > chosen.micro_batch:
        text += f"; up to micro batch {largest} would fit"
    return _status(chosen, "Fits", largest, text)


def gib(size: float) -> str:
    """Bytes as a quantity with one decimal."""
    return f"{size / GIB:.1f}Gi"


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number."""
    digits = text.rstrip("mkKMGTPi")
    return float(digits) * _SUFFIXES[text[len(digits) :]]
