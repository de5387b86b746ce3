"""From `method` to a PEFT configuration, one builder per method, and what a method needs besides: a penalty, a budget."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.method import Method
from finetune_trainer.memory.architecture import architecture
from finetune_trainer.memory.trainable import PROMPT_ENCODER_SIZE, ia3_modules
from finetune_trainer.methods.combinations import LORA_METHODS, is_pattern

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

INITIALIZATIONS: dict[str, bool | str] = {
    "Default": True,
    "Gaussian": "gaussian",
    "PiSSA": "pissa",
    "OLoRA": "olora",
    "EVA": "eva",
    "LoftQ": True,  # computed from the quantization error once the model is wrapped (initialization.py)
}
BIASES = {"None": "none", "All": "all", "LoraOnly": "lora_only"}
REBASED = frozenset({"PiSSA", "OLoRA"})  # these take the adapter's start out of the base weights
FROM_WEIGHTS = REBASED | {"LoftQ"}  # the start is no part of what was learned, and is taken out of the artifact


def targets(names: tuple[str, ...] | list[str]) -> list[str] | str:
    """`targetModules` as PEFT reads them: the word all-linear, one regular expression, or exact names."""
    names = list(names)
    return names[0] if names == ["all-linear"] or is_pattern(names) else sorted(names)


def linear_names(model: Any) -> list[str]:
    """What all-linear comes to in this model: the names of its linear layers, output head left out."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    }
    return sorted(found)


def lora(spec: FineTuneSpec, steps: int, task: str) -> "PeftConfig":
    from peft import LoraConfig

    asked = spec.method.lora
    options: dict[str, Any] = {}
    if asked.initialization == "EVA":
        from peft import EvaConfig

        options["eva_config"] = EvaConfig(rho=1.0)  # every target keeps its rank: servers want to know it beforehand
    return LoraConfig(
        task_type=task,
        r=asked.rank,
        lora_alpha=asked.alpha,
        lora_dropout=float(asked.dropout),
        target_modules=targets(asked.target_modules),
        exclude_modules=list(asked.exclude_modules) or None,
        modules_to_save=list(asked.modules_to_save) or None,
        bias=BIASES[asked.bias],  # type: ignore[arg-type]
        use_rslora=asked.use_rslora,
        use_dora=asked.use_dora,
        init_lora_weights=INITIALIZATIONS[asked.initialization],  # type: ignore[arg-type]
        layers_to_transform=list(asked.layers_to_transform) or None,
        rank_pattern=dict(asked.rank_pattern),
        alpha_pattern=dict(asked.alpha_pattern),
        **options,
    )


def adalora(spec: FineTuneSpec, steps: int, task: str) -> "PeftConfig":
    """Ranks are first cut after warmupRatio of the steps and fixed for the last finalRatio of them."""
    from peft import AdaLoraConfig

    asked = spec.method.ada_lora
    warmup, final = int(steps * asked.warmup_ratio), int(steps * asked.final_ratio)
    return AdaLoraConfig(
        task_type=task,
        target_r=asked.target_rank,
        init_r=asked.initial_rank,
        tinit=warmup,
        tfinal=final,
        deltaT=max(1, (steps - warmup - final) // 50),
        total_step=steps,
        orth_reg_weight=asked.orthogonal_weight,
        lora_alpha=asked.alpha,
        lora_dropout=float(asked.dropout),
        target_modules=targets(asked.target_modules),
    )


def ia3(spec: FineTuneSpec, steps: int, task: str) -> "PeftConfig":
    """Both lists are written out (peft_config): PEFT's own defaults know few architectures, and differ between them."""
    from peft import IA3Config

    asked = spec.method.ia3
    return IA3Config(
        task_type=task,
        target_modules=targets(asked.target_modules) if asked.target_modules else None,
        # PEFT reads an empty list as none of the targets, and a missing one as its default
        feedforward_modules=sorted(asked.feedforward_modules) if asked.target_modules else None,
    )


def prefix_tuning(spec: FineTuneSpec, steps: int, task: str) -> "PeftConfig":
    from peft import PrefixTuningConfig

    asked = spec.method.virtual_tokens
    return PrefixTuningConfig(
        task_type=task,
        num_virtual_tokens=asked.count,
        prefix_projection=asked.projection,
        encoder_hidden_size=PROMPT_ENCODER_SIZE if asked.projection else None,  # type: ignore[arg-type]
    )


def prompt_tuning(spec: FineTuneSpec, steps: int, task: str) -> "PeftConfig":
    """Random start here; the embeddings of initText are copied in once the model is there (initialization.py)."""
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type=task, num_virtual_tokens=spec.method.virtual_tokens.count)


def p_tuning(spec: FineTuneSpec, steps: int, task: str) -> "PeftConfig":
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=spec.method.virtual_tokens.count,
        encoder_hidden_size=PROMPT_ENCODER_SIZE,
    )


BUILDERS: dict[str, Callable[[FineTuneSpec, int, str], "PeftConfig"]] = {
    "QLoRA": lora,
    "LoRA": lora,
    "AdaLoRA": adalora,
    "IA3": ia3,
    "PrefixTuning": prefix_tuning,
    "PromptTuning": prompt_tuning,
    "PTuning": p_tuning,
}


def peft_config(spec: FineTuneSpec, steps: int, model: Any) -> "PeftConfig":
    """The PEFT configuration of `method` for a model, and a run of `steps` steps."""
    task = "SEQ_CLS" if spec.objective.type == "Reward" else "CAUSAL_LM"
    method = spec.method
    if method.type in LORA_METHODS and method.lora.layers_to_transform and method.lora.target_modules == ["all-linear"]:
        # PEFT takes layersToTransform with names only
        method = _with(method, "lora", target_modules=linear_names(model))
    elif method.type == "IA3" and (shape := architecture(model.config.get_text_config().to_dict())):
        asked, inputs = ia3_modules(shape, list(method.ia3.target_modules), list(method.ia3.feedforward_modules))
        method = _with(method, "ia3", target_modules=asked, feedforward_modules=inputs)
    return BUILDERS[method.type](spec.model_copy(update={"method": method}), steps, task)


def _with(method: Method, part: str, **changed: list[str]) -> Method:
    return method.model_copy(update={part: getattr(method, part).model_copy(update=changed)})


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def keep_trainables_exact(model: torch.nn.Module) -> None:
    """Hold what is trained in float32: bf16 loses small updates, and a resumed run would not be the same run."""
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()


def penalty(model: "PeftModel") -> torch.Tensor | None:
    """AdaLoRA's pull towards orthogonal factors, which PEFT adds only to losses that the model itself computes."""
    config = model.peft_config["default"]
    weight = getattr(config, "orth_reg_weight", None)
    if weight is None:
        return None
    norms = []
    for name, factor in trainable(model).items():
        if "lora_A" in name or "lora_B" in name:
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    return float(weight) * torch.stack(norms).mean()
