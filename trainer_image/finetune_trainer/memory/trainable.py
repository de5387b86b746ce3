"""How many parameters a method trains, exactly, from config.json alone; tests compare the counts with PEFT's own."""

from __future__ import annotations

import re

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.method import Lora
from finetune_trainer.memory.architecture import HEAD, Architecture, Linear, matches
from finetune_trainer.methods.combinations import LORA_METHODS, is_pattern

PROMPT_ENCODER_SIZE = 128  # width of the perceptrons of PTuning and of PrefixTuning's projection


def trainable_parameters(shape: Architecture, spec: FineTuneSpec) -> int:
    """The parameters that an optimizer gets: the method's, and the head of a reward model."""
    return _adapter(shape, spec) + (shape.hidden if spec.objective.type == "Reward" else 0)


def _adapter(shape: Architecture, spec: FineTuneSpec) -> int:
    method = spec.method
    if method.type in LORA_METHODS:
        return _lora(shape, method.lora)
    if method.type == "AdaLoRA":
        rank = method.ada_lora.initial_rank  # the budget masks singular values, it takes none away while training
        targets = shape.targets(method.ada_lora.target_modules)
        return sum(rank * (linear.inputs + linear.outputs + 1) for _, linear in targets)
    if method.type == "IA3":
        asked, forward = ia3_modules(shape, list(method.ia3.target_modules), list(method.ia3.feedforward_modules))
        return sum(linear.inputs if matches(name, forward) else linear.outputs for name, linear in shape.targets(asked))
    virtual, width = method.virtual_tokens.count, PROMPT_ENCODER_SIZE
    if method.type == "PromptTuning":
        return virtual * shape.hidden
    if method.type == "PTuning":  # an embedding and a perceptron of three layers
        return virtual * shape.hidden + _dense(shape.hidden, width) + _dense(width, width) + _dense(width, shape.hidden)
    stored = 2 * shape.layers * shape.key_value
    if method.virtual_tokens.projection:
        return virtual * shape.key_value + _dense(shape.key_value, width) + _dense(width, stored)
    return virtual * stored


def lora_targets(shape: Architecture, lora: Lora) -> list[tuple[str, Linear]]:
    """(full name, layer) of what gets two matrices: a layer that is trained whole does not."""
    found = shape.targets(lora.target_modules, lora.exclude_modules, lora.layers_to_transform)
    return [(name, linear) for name, linear in found if not name.endswith(tuple(lora.modules_to_save))]


def rank_of(lora: Lora, name: str) -> int:
    """The rank at a module: the first pattern that fits, as PEFT matches them."""
    return next((rank for pattern, rank in lora.rank_pattern.items() if fits(pattern, name)), lora.rank)


def fits(pattern: str, name: str) -> bool:
    """Whether a key of rankPattern or alphaPattern means this module."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def ia3_modules(shape: Architecture, targets: list[str], feedforward: list[str]) -> tuple[list[str], list[str]]:
    """What IA3 scales, and which of it at the input: as asked, else keys, values and the end of the MLP."""
    names = [linear.name for linear in shape.linears]
    last = next((linear.path for linear in shape.linears if linear.reads == "product"), "")  # the MLP's way out
    ends = [last] if last else []  # experts are no layers that could be scaled
    if targets == ["all-linear"]:
        return [linear.path for linear in shape.linears], feedforward or ends
    if is_pattern(targets):
        return targets, feedforward or ends
    if targets:
        plain = [name for name in targets if last == name or last.endswith(f".{name}")]
        return targets, feedforward or plain
    keys = [shape.linears[names.index(name)].path for name in ("k_proj", "v_proj") if name in names]
    return [*(keys or [shape.linears[0].path]), *ends], ends


def _lora(shape: Architecture, lora: Lora) -> int:
    count = 0
    for name, linear in lora_targets(shape, lora):
        count += rank_of(lora, name) * (linear.inputs + linear.outputs)
        count += linear.outputs if lora.use_dora else 0  # its magnitude
        count += linear.outputs if linear.bias and lora.bias == "LoraOnly" else 0
    whole = whole_modules(shape, lora)
    if lora.bias == "All":
        count += shape.biases - sum(_bias(shape, name, linear) for name, linear in whole.items())
    for name, saved in whole.items():
        count += (saved.weights if saved else shape.vocabulary * shape.hidden) + _bias(shape, name, saved)
    return count


def _bias(shape: Architecture, name: str, linear: Linear | None) -> int:
    if linear:
        return linear.outputs if linear.bias else 0
    return shape.vocabulary if name == HEAD and shape.family.head_bias else 0


def whole_modules(shape: Architecture, lora: Lora) -> dict[str, Linear | None]:
    """By full name, what modulesToSave trains whole: linear layers, and None for embeddings and head."""
    every: dict[str, Linear | None] = dict(shape.targets(["all-linear"]))
    every |= {shape.embedding: None, HEAD: None}
    # PEFT compares the ends of names, so that proj means every projection
    return {name: linear for name, linear in every.items() if name.endswith(tuple(lora.modules_to_save))}


def _dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
