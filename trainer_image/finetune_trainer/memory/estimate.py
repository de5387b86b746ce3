"""Memory of one GPU that a run will need, from config.json alone, part by part, each with the source of its formula.

Known to the byte: weights, quantization state, adapter, optimizer. Estimated: activations, the allocator's waste, the
CUDA context; that is what the band from low to high is for.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.memory.architecture import Architecture
from finetune_trainer.memory.trainable import lora_targets, rank_of, trainable_parameters, whole_modules
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
    logits = _logits(shape, work, tokens)
    parts: tuple[Part, ...] = (
        _weights(shape, work),
        _adapter(spec, trained),
        _optimizer(spec, trained),
        _activations(shape, work, tokens, checkpointing),
        logits,
        _backward(shape, work, tokens, checkpointing, logits),
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
    grown = sum(part.expected for part in parts[3:6])
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
    if shape.experts and linear < full:
        source += ", experts too: bitsandbytes quantizes linear layers only"
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


def _adapter(spec: FineTuneSpec, trained: int) -> Part:
    if _width(spec) == 4:
        return _exact("adapter and gradients", 8 * trained, "float32 weights and gradients (PEFT's default)")
    source = "float32 weights and gradients (PEFT's default), and autocast's 16-bit copy of the weights"
    return _exact("adapter and gradients", 10 * trained, source)


def _optimizer(spec: FineTuneSpec, trained: int) -> Part:
    name = spec.training.optimizer
    # Adafactor (Shazeer and Stern 2018) remembers a row and a column of a matrix: two rows and columns of LoRA's pair.
    factored = 4 / spec.method.lora.rank if spec.method.type in LORA_METHODS else 4
    per_parameter = {
        "adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_32bit": 8,
        "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256,
        "lion_8bit": 1 + 4 / 256, "adafactor": factored, "sgd": 0,
    }[name]  # fmt: skip
    size = trained * per_parameter
    source = f"{name}: {per_parameter:g} bytes per trained parameter, as torch and bitsandbytes allocate them"
    return Part("optimizer", 0 if name.startswith("paged") else size, size, size, source)


def _activations(shape: Architecture, work: Workload, tokens: int, checkpointing: bool) -> Part:
    """What a forward pass keeps for the backward one: Architecture.kept and what the method's layers keep."""
    if checkpointing:
        size = tokens * _blocks(shape, work.spec) * _width(work.spec) * shape.hidden
        return Part("activations", size, size, 1.15 * size, "checkpointing: each block's input (Chen et al. 2016)")
    kept = _blocks(shape, work.spec) * shape.kept(_width(work.spec), _keys(shape, work, tokens))
    size = tokens * (kept + _kept_by_method(shape, work.spec, _width(work.spec)))
    source = "every block (Korthikanti et al. 2022, recounted for frozen weights)"
    return Part("activations", 0.8 * size, size, 1.15 * size, source)


def _blocks(shape: Architecture, spec: FineTuneSpec) -> int:
    """Blocks that gradients go back through: none comes before the first one that is trained."""
    lora = spec.method.lora
    if spec.method.type not in LORA_METHODS or lora.bias == "All" or shape.embedding in whole_modules(shape, lora):
        return shape.layers
    trained = {name.removesuffix(linear.path) for name, linear in lora_targets(shape, lora)}
    trained |= {name.removesuffix(linear.path) for name, linear in whole_modules(shape, lora).items() if linear}
    first = (number for number in range(shape.layers) if f"{shape.block.format(number)}." in trained)
    return shape.layers - next(first, 0)


def _keys(shape: Architecture, work: Workload, tokens: int) -> int:
    """Tokens that each token is compared with, where attention keeps its scores."""
    return work.row_tokens if shape.family.padded else tokens


def _block(shape: Architecture, work: Workload, tokens: int) -> int:
    """Bytes per token that a block keeps."""
    width = _width(work.spec)
    method = _kept_by_method(shape, work.spec, width) // _blocks(shape, work.spec)
    return shape.kept(width, _keys(shape, work, tokens)) + method


def _width(spec: FineTuneSpec) -> int:
    """Bytes of a value that is computed with."""
    return 4 if spec.training.precision == "FP32" else 2


def _kept_by_method(shape: Architecture, spec: FineTuneSpec, width: int) -> int:
    """Bytes per token that the method's own layers keep, in all blocks together: counted in PEFT's forward passes."""
    method = spec.method
    if method.type == "IA3":  # what is scaled, as it was before; with bf16 some of it in float32
        return max(width, 3) * trainable_parameters(shape, spec)
    if method.type == "AdaLoRA":
        copy = 4 + (1 if method.ada_lora.dropout else 0)  # of each layer's input in float32, and dropout's mask
        small = 2 * width * method.ada_lora.initial_rank
        return sum(copy * linear.inputs + small for _, linear in shape.targets(method.ada_lora.target_modules))
    if method.type not in LORA_METHODS:
        return 0
    lora = method.lora
    targets = lora_targets(shape, lora)
    magnitude = 3 * width if lora.use_dora else 0  # DoRA scales two results and keeps a third
    own = sum(2 * width * rank_of(lora, name) + magnitude * linear.outputs for name, linear in targets)
    if lora.dropout or lora.use_dora:
        return own + sum((width + (1 if lora.dropout else 0)) * linear.inputs for _, linear in targets)
    # Without dropout the input itself is kept, once for all layers that read it.
    read = {(name.removesuffix(linear.path), linear.reads): linear.inputs for name, linear in targets}
    return own + width * sum(read.values())


def _logits(shape: Architecture, work: Workload, tokens: int) -> Part:
    """Logits exist for learned positions only; their gradient takes their place, float32 exists for one chunk at a
    time. Both answers of a pair have theirs at once, and ORPO learns the chosen one's prompt too. Where samples are
    padded, those of all positions exist until the learned ones have been picked out of them.
    """
    spec, learned = work.spec, work.learned
    if spec.objective.type == "Reward":
        return _exact("logits", 0, "one score per text")
    if spec.objective.type == "ORPO":
        learned = (1 + learned) / 2
    width = _width(spec)
    chunk = min(tokens, _LOSS_CHUNK) * shape.vocabulary * (8 if width == 2 else 4)
    padded = shape.family.padded or virtual_tokens(spec)
    copies = 1 + shape.capped  # tanh keeps what it made

    def size(share: float) -> float:
        picked = tokens * share * shape.vocabulary * width
        every = tokens * shape.vocabulary * width
        if not padded:
            return copies * picked + chunk
        return picked + max(copies * every, shape.capped * every + chunk)

    source = f"learned positions x vocabulary x {width} bytes, and one chunk in float32"
    return Part("logits", size(learned) / 2, size(learned), size(1.0), source)


def _backward(shape: Architecture, work: Workload, tokens: int, checkpointing: bool, logits: Part) -> Part:
    """Gradients on their way back through the widest layer, what quantized weights are expanded to meanwhile, and with
    checkpointing the block that they go through, computed again. The logits are gone by then.
    """
    spec, width = work.spec, _width(work.spec)
    widest = max(max(linear.inputs, linear.outputs) for linear in shape.linears)
    values: float = 4 * widest
    if routed := shape.experts:  # inputs and insides are gathered for each expert that a token goes through (counted)
        values += 1.5 * routed.chosen * (shape.hidden + routed.intermediate)
    size = tokens * width * values
    source = "gradients of the widest layer"
    if spec.method.quantization.type != "None":
        size += width * max(linear.weights for linear in shape.linears)
        source += ", the largest one's weights expanded"
    if checkpointing:
        size += tokens * _block(shape, work, tokens)
        source += ", one block computed again"
    more = max(0, size - logits.expected)
    low, high = max(0, 0.8 * size - logits.low), max(0, 1.2 * size - logits.high)
    return Part("backward pass", min(low, more), more, max(high, more), f"{source}, less the logits, gone by then")


def _exact(name: str, size: float, source: str) -> Part:
    return Part(name, size, size, size, source)


def gib(size: float) -> str:
    """Bytes as a quantity with one decimal."""
    return f"{size / GIB:.1f}Gi"


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number."""
    digits = text.rstrip("mkKMGTPi")
    return float(digits) * _SUFFIXES[text[len(digits) :]]
