"""Which options of `method`, `objective` and `training` cannot be trained together, and why: a table of rules without torch.

prepare refuses with it before a GPU is asked for. Each rule is something that PEFT or bitsandbytes cannot do, or does wrong.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from finetune_operator.api.finetune import FineTuneSpec

LORA_METHODS = frozenset({"LoRA", "QLoRA"})
VIRTUAL_TOKEN_METHODS = frozenset({"PrefixTuning", "PromptTuning", "PTuning"})


class Rule(NamedTuple):
    """Holds when `applies` is true of a spec; then the spec is refused with `message`."""

    applies: Callable[[FineTuneSpec], bool]
    message: str


def quantization_type(spec: FineTuneSpec) -> str:
    """NF4, FP4, INT8 or None (the word): what the base weights are held in."""
    return spec.method.quantization.type


def virtual_tokens(spec: FineTuneSpec) -> bool:
    """Whether the method learns tokens that stand before each sample, rather than changing layers."""
    return spec.method.type in VIRTUAL_TOKEN_METHODS


def can_checkpoint(spec: FineTuneSpec) -> bool:
    """Whether activations can be computed twice: PrefixTuning's vectors are in the cache, which that switches off."""
    return spec.method.type != "PrefixTuning"


def is_pattern(targets: Sequence[str]) -> bool:
    """Whether targetModules is one regular expression, rather than names or all-linear."""
    return len(targets) == 1 and re.fullmatch(r"[\w.-]+", targets[0]) is None


def _initialization(spec: FineTuneSpec) -> str:
    return spec.method.lora.initialization if spec.method.type in LORA_METHODS else "Default"


def _quantized(spec: FineTuneSpec) -> bool:
    return quantization_type(spec) != "None"


def _lora_option(name: str) -> Callable[[FineTuneSpec], bool]:
    return lambda spec: bool(spec.method.type in LORA_METHODS and getattr(spec.method.lora, name))


RULES: tuple[Rule, ...] = (
    Rule(
        lambda s: s.method.type == "QLoRA" and quantization_type(s) not in ("NF4", "FP4"),
        "method.quantization.type: QLoRA means a 4-bit base; use NF4 or FP4, or method.type LoRA",
    ),
    Rule(
        lambda s: _initialization(s) in ("PiSSA", "OLoRA") and _quantized(s),
        "method.lora.initialization: PiSSA and OLoRA change the base weights and cannot change quantized ones; "
        "use method.type LoRA without quantization, or initialization LoftQ",
    ),
    Rule(
        lambda s: _initialization(s) == "LoftQ" and quantization_type(s) not in ("NF4", "FP4"),
        "method.lora.initialization: LoftQ makes up for 4-bit quantization; use it with QLoRA, or initialization Default",
    ),
    Rule(
        lambda s: _initialization(s) in ("PiSSA", "OLoRA", "LoftQ") and _lora_option("use_dora")(s),
        "method.lora.useDora: DoRA needs an adapter that starts at zero; use initialization Default, Gaussian or EVA",
    ),
    Rule(
        lambda s: _initialization(s) == "EVA" and _lora_option("rank_pattern")(s),
        "method.lora.rankPattern: EVA shares the ranks out among the layers that get the same input; remove it, or use "
        "initialization Default",
    ),
    Rule(
        lambda s: quantization_type(s) == "INT8" and _lora_option("use_dora")(s),
        "method.lora.useDora: DoRA reads the base weights in every step, which INT8 layers do not give; use method.type "
        "QLoRA, or quantization None",
    ),
    Rule(
        lambda s: (
            bool(s.method.type in LORA_METHODS and s.method.lora.layers_to_transform)
            and is_pattern(s.method.lora.target_modules)
        ),
        "method.lora.layersToTransform: not together with a regular expression in targetModules; write the layers into the "
        "expression, or give names",
    ),
    Rule(
        lambda s: not can_checkpoint(s) and s.training.gradient_checkpointing == "Enabled",
        "training.gradientCheckpointing: PrefixTuning keeps its vectors in the cache, which checkpointing switches off; "
        "use Auto or Disabled",
    ),
    Rule(
        lambda s: virtual_tokens(s) and s.objective.type not in ("SFT",),
        "objective.type: virtual tokens are trained with SFT only; use LoRA or QLoRA for this objective",
    ),
    Rule(
        lambda s: s.method.type == "AdaLoRA" and s.objective.type == "Reward",
        "method.type: AdaLoRA is not trained with objective Reward; use LoRA",
    ),
    Rule(
        lambda s: _initialization(s) == "EVA" and s.objective.type == "Reward",
        "method.lora.initialization: EVA looks at one text after the other, a Reward row is two; use Default",
    ),
)

# What a shared-out model cannot do: its blocks are gathered for their backward pass and computed again in it.
SHARING_RULES: tuple[Rule, ...] = (
    Rule(
        lambda s: not can_checkpoint(s),
        "method.type: PrefixTuning cannot compute a block twice, as shared-out blocks are; use LoRA or QLoRA",
    ),
    Rule(
        lambda s: s.training.gradient_checkpointing == "Disabled",
        "training.gradientCheckpointing: blocks are gathered for their backward pass and computed again; use Auto",
    ),
)


def sharing_refusal(spec: FineTuneSpec) -> str | None:
    """Why the GPUs of a run could not share the base model; None: they can."""
    return next((rule.message for rule in SHARING_RULES if rule.applies(spec)), None)


def refusals(spec: FineTuneSpec) -> Iterator[str]:
    """The message of every rule that a spec breaks; none: it can be trained."""
    return (rule.message for rule in RULES if rule.applies(spec))
