"""Whether `method` can be applied to this base model: names, ranks and lengths against its config.json.

prepare refuses with it before a GPU is asked for. What PEFT would ignore without a word is refused too: a name that
matches nothing is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.method import Lora
from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.memory.architecture import HEAD, Architecture, Config
from finetune_trainer.memory.trainable import fits, ia3_modules, lora_targets, rank_of, whole_modules
from finetune_trainer.methods.combinations import LORA_METHODS, virtual_tokens
from finetune_trainer.methods.experts import adapts_experts, expert_refusals

# These take both matrices out of a decomposition, which has no more parts than the smaller side of a layer.
DECOMPOSED = frozenset({"PiSSA", "OLoRA", "LoftQ", "EVA"})


def refuse_unsuitable(shape: Architecture | None, spec: FineTuneSpec, config: Config, row_tokens: int = 0) -> None:
    """UnsupportedCombination with everything that is wrong. `row_tokens`: of the longest row, 0 when not known yet."""
    if adapts_experts(spec, config):
        shape = None
    found = list(_unknown_model(spec, config) if shape is None else _unsuitable(shape, spec, config, row_tokens))
    if spec.method.type in LORA_METHODS:
        found += expert_refusals(spec.method.lora, config)
    if found:
        raise RunFailure(UNSUPPORTED_COMBINATION, "\n".join(found))


def _unknown_model(spec: FineTuneSpec, config: Config) -> Iterator[str]:
    if spec.method.type == "IA3" and not spec.method.ia3.target_modules:
        kind = config.get("model_type")
        yield f"method.ia3.targetModules: model type {kind!r} has no default here; name the layers to scale"


def _unsuitable(shape: Architecture, spec: FineTuneSpec, config: Config, row_tokens: int) -> Iterator[str]:
    method = spec.method
    if method.type in LORA_METHODS:
        yield from _unknown(shape, "method.lora.targetModules", method.lora.target_modules)
        yield from _lora(shape, method.lora, quantized=method.quantization.type != "None")
    elif method.type == "AdaLoRA":
        yield from _unknown(shape, "method.adaLora.targetModules", method.ada_lora.target_modules)
    elif method.type == "IA3":
        yield from _unknown(shape, "method.ia3.targetModules", method.ia3.target_modules)
        targets, _ = ia3_modules(shape, list(method.ia3.target_modules), [])
        for name in method.ia3.feedforward_modules:
            if not any(shape.targets([name])) or not set(shape.targets([name])) <= set(shape.targets(targets)):
                yield f"method.ia3.feedforwardModules: {name} is none of targetModules in this model; add it there"
    elif method.type == "PrefixTuning" and shape.model_type == "falcon":
        yield "method.type: PEFT's PrefixTuning does not fit falcon's shared keys; use PromptTuning, PTuning or LoRA"
    context = int(config.get("max_position_embeddings") or config.get("n_positions") or 0)
    count = method.virtual_tokens.count
    if virtual_tokens(spec) and context and row_tokens + count > context:
        yield (
            f"method.virtualTokens.count: {count} virtual tokens before a row of {row_tokens} are more than the "
            f"{context} positions of this model; lower training.maxLength to {context - count} or less"
        )


def _unknown(shape: Architecture, field: str, names: Iterable[str]) -> Iterator[str]:
    unknown = [name for name in names if not shape.targets([name])]
    if unknown:
        yield (
            f"{field}: {', '.join(unknown)} names no layer of this {shape.model_type} model; its linear layers are "
            f"{_layers(shape)}"
        )


def _layers(shape: Architecture) -> str:
    return ", ".join(dict.fromkeys(linear.name for linear in shape.linears))


def _lora(shape: Architecture, lora: Lora, quantized: bool) -> Iterator[str]:
    yield from _unknown(shape, "method.lora.excludeModules", lora.exclude_modules)
    if beyond := [number for number in lora.layers_to_transform if number >= shape.layers]:
        yield (
            f"method.lora.layersToTransform: {', '.join(map(str, beyond))} is beyond the last layer; this model has "
            f"{shape.layers}, counted from 0"
        )
    targets = lora_targets(shape, lora)
    if not targets and not beyond:
        yield "method.lora.targetModules: excludeModules and modulesToSave leave no layer; name fewer there"
    for field, patterns in (("rankPattern", lora.rank_pattern), ("alphaPattern", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(fits(pattern, name) for name, _ in targets):
                yield f"method.lora.{field}: {pattern} matches none of the target layers; correct or remove it"
    if lora.initialization == "OLoRA" and shape.model_type == "gpt2":
        yield "method.lora.initialization: PEFT's OLoRA does not fit GPT-2's transposed layers; use PiSSA or Default"
    if lora.initialization in DECOMPOSED:
        small = [
            (name, rank_of(lora, name), side)
            for name, linear in targets
            if rank_of(lora, name) > (side := _side(lora.initialization, linear.inputs, linear.outputs))
        ]
        for name, rank, side in small[:1]:
            yield (
                f"method.lora.rank: {lora.initialization} finds at most {side} directions in {name}, not {rank}; lower "
                "the rank there, or use initialization Default"
            )
    yield from _saved(shape, lora, quantized)


def _side(initialization: str, inputs: int, outputs: int) -> int:
    return inputs if initialization == "EVA" else min(inputs, outputs)  # EVA decomposes what comes in


def _saved(shape: Architecture, lora: Lora, quantized: bool) -> Iterator[str]:
    for name in lora.modules_to_save:
        meant = whole_modules(shape, lora.model_copy(update={"modules_to_save": [name]}))
        if not meant:
            known = ", ".join(dict.fromkeys([HEAD, shape.embedding.rpartition(".")[2], _layers(shape)]))
            yield f"method.lora.modulesToSave: {name} names no layer that can be trained whole; those are {known}"
        elif quantized and any(meant.values()):
            yield (
                f"method.lora.modulesToSave: {name} is quantized in the base model and cannot be trained whole; use "
                "quantization None, or put it in targetModules instead"
            )
