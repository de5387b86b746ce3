"""Memory of one GPU that a run will need, from config.json alone, part by part, each with the source of its formula.

Known to the byte: weights, quantization state, adapter, optimizer. Estimated: activations, the allocator's waste, the
CUDA context; that is what the band from low to high is for.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.memory.architecture import Architecture
from finetune_trainer.memory.trainable import trainable_parameters
from finetune_trainer.methods.combinations import LORA_METHODS, virtual_tokens

GIB = 1 << 30
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
    together; `learned`: share of its tokens; `shards`: GPUs that share the base model, 1 when each holds it whole.
    """

    spec: FineTuneSpec
    row_tokens: int
    learned: float = 1.0
    parameters: int = 0  # as counted in the weights' headers, 0: by the architecture
    shards: int = 1


def longest_row(spec: FineTuneSpec) -> int:
    """Tokens of the longest row: a pair is two texts, each with the prompt, that are computed together."""
    return spec.training.max_length * (2 if spec.objective.type in PAIRS else 1)


def estimate(shape: Architecture, work: Workload, micro_batch: int, checkpointing: bool) -> Estimate:
    """Bytes on one GPU, part by part, for one micro batch. A base model that is shared out is always checkpointed."""
    spec = work.spec
    trained = trainable_parameters(shape, spec)
    tokens = micro_batch * (work.row_tokens + (spec.method.virtual_tokens.count if virtual_tokens(spec) else 0))
    checkpointing = checkpointing or work.shards > 1
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
    if work.shards > 1:
        parts = (*parts, _gathered(shape, spec))
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
    linear, full, source = _stored(work.spec)
    total = work.parameters or shape.parameters
    blocks = linear * shape.linear_weights + _scales(shape, work.spec)
    other = full * max(0, total - shape.linear_weights)
    if work.shards == 1:
        return _exact("weights", blocks + other, source)
    embeddings = full * shape.vocabulary * shape.hidden * (2 if shape.head else 1)
    shared = (blocks + embeddings) / work.shards
    return _exact("weights", shared + other - embeddings, f"{source}; matrices shared out over {work.shards} GPUs")


def _gathered(shape: Architecture, spec: FineTuneSpec) -> Part:
    """A shared-out model's block is whole while it computes, and the next one is on its way; so is the embedding, and
    the head."""
    linear, full, _ = _stored(spec)
    block = linear * shape.linear_weights / shape.layers
    largest = max(2 * block, full * shape.vocabulary * shape.hidden)
    source = "two blocks, or the embedding or head, whole while they compute (ZeRO stage 3, Rajbhandari et al. 2020)"
    return Part("gathered blocks", largest, largest, largest + block, source)


def _stored(spec: FineTuneSpec) -> tuple[float, int, str]:
    """Bytes of a weight in a block's linear layer, of any other parameter, and where that comes from."""
    quantization = spec.method.quantization
    full = 4 if spec.training.precision == "FP32" else 2
    if quantization.type in ("NF4", "FP4"):
        # QLoRA (Dettmers et al. 2023), section 3: half a byte, and per 64 weights a constant of 8 bit with one of 32
        # bit per 256 of
        # those, or one of 32 bit when not double-quantized. Equal to what bitsandbytes allocates (notes: 69,019,392
        # measured).
        state = 1 / 64 + 4 / (64 * 256) if quantization.double_quant else 4 / 64
        kind = f"{quantization.type}: half a byte and a constant per 64 weights (Dettmers et al. 2023)"
        return 0.5 + state, full, f"{kind}; the rest {8 * full} bit"
    if quantization.type == "INT8":
        return 1, full, "LLM.int8(): a byte, and a float32 scale per row (Dettmers et al. 2022)"
    return full, full, f"{8 * full} bit per parameter"


def _scales(shape: Architecture, spec: FineTuneSpec) -> float:
    """Bytes of INT8's scales."""
    if spec.method.quantization.type != "INT8":
        return 0
    return 4 * shape.layers * sum(layer.outputs for layer in shape.linears)


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
    gated = any(linear.name in ("gate_proj", "gate_up_proj") for linear in shape.linears)
    block = 2 * 4 * shape.hidden  # two norms compute in float32
    block += width * 2 * (shape.query + shape.key_value)  # query, key, value, attention's output
    block += width * (3 if gated else 2) * shape.intermediate
    block += _kept_by_method(shape, spec, width) // shape.layers
    if checkpointing:
        kept = shape.layers * width * shape.hidden + block
        source = "checkpointing: each block's input, and one block computed again (Chen et al. 2016)"
    else:
        kept, source = shape.layers * block, "every block (Korthikanti et al. 2022, recounted for frozen weights)"
    size = tokens * kept
    return Part("activations", 0.8 * size, size, 1.15 * size, source)


def _kept_by_method(shape: Architecture, spec: FineTuneSpec, width: int) -> int:
    """Bytes per token that the method's own layers keep, in all blocks together: counted in PEFT's forward passes."""
    method = spec.method
    if method.type == "IA3":  # what is scaled, as it was before; with bf16 some of it in float32
        return max(width, 3) * trainable_parameters(shape, spec)
    if method.type not in LORA_METHODS | {"AdaLoRA"}:
        return 0
    adalora = method.type == "AdaLoRA"
    rank = method.ada_lora.initial_rank if adalora else method.lora.rank
    dropout = method.ada_lora.dropout if adalora else method.lora.dropout
    targets = method.ada_lora.target_modules if adalora else method.lora.target_modules
    copy = (4 if adalora else width) + (1 if dropout else 0)  # of the input, and dropout's mask
    dora = method.type in LORA_METHODS and method.lora.use_dora
    magnitude = 2 * width + 4 if dora else 0  # DoRA scales two results, and their sum is float32
    return sum(
        copy * linear.inputs + 2 * width * rank + magnitude * linear.outputs
        for _, linear in shape.targets(targets, method.lora.exclude_modules)
    )


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


def gib(size: float) -> str:
    """Bytes as a quantity with one decimal."""
    return f"{size / GIB:.1f}Gi"


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number."""
    digits = text.rstrip("mkKMGTPi")
    return float(digits) * _SUFFIXES[text[len(digits) :]]
