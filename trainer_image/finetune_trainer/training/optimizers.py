"""`training.optimizer` to an optimizer, and its state as named tensors, so that a checkpoint holds no pickle."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.training.eager import no_compiler

CONSTANTS = frozenset({"qmap1", "qmap2"})  # bitsandbytes' code books, one object shared by all parameters
Groups = list[dict[str, Any]]


def _bitsandbytes(name: str) -> Callable[..., Optimizer]:
    def build(groups: Groups, **options: Any) -> Optimizer:
        import bitsandbytes.optim

        made: Optimizer = getattr(bitsandbytes.optim, name)(groups, **options)
        return made

    return build


def _sgd(groups: Groups, **options: Any) -> Optimizer:
    return torch.optim.SGD(groups, **options)


def _adamw(groups: Groups, **options: Any) -> Optimizer:
    return torch.optim.AdamW(groups, **options)


def _adamw_fused(groups: Groups, **options: Any) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True, **options)


def _adafactor(groups: Groups, **options: Any) -> Optimizer:
    """With the learning rate as it is. torch's own multiplies it by the size of each weight, never below 0.001: a matrix B
    that starts at zero would learn a thousand times slower."""
    from transformers.optimization import Adafactor

    return Adafactor(groups, scale_parameter=False, relative_step=False, **options)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": _adamw_fused,
    "adamw_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw_32bit": _bitsandbytes("PagedAdamW32bit"),
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit"),
    "lion_8bit": _bitsandbytes("Lion8bit"),
    "adafactor": _adafactor,
    "sgd": _sgd,
}


def parameter_groups(spec: FineTuneSpec, named: dict[str, torch.nn.Parameter]) -> Groups:
    """Biases and vectors do not decay; with loraPlusRatio the B matrices learn that many times faster.

    Each group's `factor` is what it multiplies the run's learning rate by.
    """
    ratio = spec.method.lora.lora_plus_ratio if spec.method.type in ("LoRA", "QLoRA") else None
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in named.items():
        fast = ratio is not None and ("lora_B" in name or "lora_embedding_B" in name)
        groups.setdefault((fast, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": spec.training.weight_decay if decays else 0.0,
            "factor": (ratio or 1.0) if fast else 1.0,
        }
        for (fast, decays), parameters in groups.items()
    ]


@no_compiler()
def make_optimizer(spec: FineTuneSpec, named: dict[str, torch.nn.Parameter]) -> Optimizer:
    """The optimizer of `training.optimizer` over what is trained."""
    return OPTIMIZERS[spec.training.optimizer](parameter_groups(spec, named), lr=spec.training.learning_rate)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]


def optimizer_state(
    optimizer: Optimizer, named: dict[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """({"<parameter>/<key>": tensor}, {"<parameter>/<key>": number}): all that the optimizer remembers."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in CONSTANTS:
                continue
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def restore_optimizer(
    optimizer: Optimizer,
    named: dict[str, torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, Any],
) -> None:
    """Put back what `optimizer_state` gave. bitsandbytes makes its own buffers first (paged ones on a GPU), which are filled."""
    states: dict[str, dict[str, Any]] = {}
    for path, value in (*tensors.items(), *numbers.items()):
        name, _, key = path.rpartition("/")
        states.setdefault(name, {})[key] = value
    names = {id(parameter): name for name, parameter in named.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            saved = states.get(names[id(parameter)])
            if saved is None:
                continue
            if hasattr(optimizer, "init_state"):
                optimizer.init_state(group, parameter, group_index, index)
            state = optimizer.state[parameter]
            for key, value in saved.items():
                if not isinstance(value, torch.Tensor):
                    state[key] = value
                elif isinstance(state.get(key), torch.Tensor):
                    state[key].copy_(value)
                else:  # torch keeps the step counter on the CPU, unless it is fused
                    state[key] = value.to(parameter.device) if value.ndim or group.get("fused") else value
