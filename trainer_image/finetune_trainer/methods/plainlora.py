"""Adapters that were trained in another form, written as plain LoRA on the original weights: what every server can mount."""

from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.methods.initialization import Tensors

if TYPE_CHECKING:
    from peft import PeftModel

Plain = tuple[Tensors, dict[str, Any]]


def without_start(weights: Tensors, initial: Tensors, config: dict[str, Any]) -> Plain:
    """PiSSA and OLoRA trained B A on W - B0 A0, LoftQ on what quantization made of that.

    On W itself it is [B, -B0] [A; A0]: a LoRA of twice the rank, as PEFT's path_initial_model_for_weight_conversion
    makes one.
    """
    plain: Tensors = {}
    for name, tensor in weights.items():
        start = initial.get(name.replace(".weight", ".default.weight"))
        if start is None or ".lora_" not in name:  # biases start as the base model's, and are stored as they are
            plain[name] = tensor
        elif "lora_A" in name:
            plain[name] = torch.cat([tensor, start.cpu()]).contiguous()
        else:
            plain[name] = torch.cat([tensor, -start.cpu()], dim=1).contiguous()
    # alpha / r and alpha / sqrt(r) must stay what they were
    factor = 2**0.5 if config["use_rslora"] else 2
    doubled = {"r": 2 * config["r"], "lora_alpha": config["lora_alpha"] * factor}
    ranks = {name: 2 * rank for name, rank in (config.get("rank_pattern") or {}).items()}
    alphas = {name: alpha * factor for name, alpha in (config.get("alpha_pattern") or {}).items()}
    return plain, {**config, **doubled, "rank_pattern": ranks, "alpha_pattern": alphas}


def without_singular_values(model: "PeftModel") -> Plain:
    """AdaLoRA's B diag(E) A with the values that its budget left, folded into B.

    Layers end with different ranks; the smaller ones are padded with zeros, so that servers need to know one rank only.
    """
    from peft import LoraConfig

    layers = {name: module for name, module in model.named_modules() if "default" in getattr(module, "lora_E", {})}
    kept = {name: layer.lora_E["default"].detach().flatten().nonzero().flatten() for name, layer in layers.items()}
    rank = max([1, *map(len, kept.values())])
    plain: Tensors = {}
    for name, layer in layers.items():
        values, left = layer.lora_E["default"].detach(), kept[name]
        scaling = layer.scaling["default"] / (layer.ranknum["default"].detach() + 1e-5)  # as PEFT's forward has it
        down, up = layer.lora_A["default"].detach(), layer.lora_B["default"].detach() * values.T * scaling
        plain[f"{name}.lora_A.weight"] = _padded(down[left], rank, 0)
        plain[f"{name}.lora_B.weight"] = _padded(up[:, left], rank, 1)
    trained: Any = model.peft_config["default"]
    config = LoraConfig(
        task_type=trained.task_type,
        r=rank,
        lora_alpha=rank,  # the scaling is in B
        lora_dropout=trained.lora_dropout,
        target_modules=trained.target_modules,
        fan_in_fan_out=trained.fan_in_fan_out,
    )
    return plain, config.to_dict()


def _padded(matrix: torch.Tensor, rank: int, side: int) -> torch.Tensor:
    missing = list(matrix.shape)
    missing[side] = rank - missing[side]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim=side).to("cpu").contiguous()
