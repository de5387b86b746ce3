"""Every optimizer moves what is trained as the one of the same name in transformers' Trainer does; LoRA+ as in PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.memory.estimate import _optimizer
from finetune_trainer.training.optimizers import OPTIMIZERS, make_optimizer, optimizer_state, set_learning_rate

from .tiny import finetune_spec

# Trainer hands Adam's betas to Lion, whose authors and bitsandbytes take (0.9, 0.99).
SAME = sorted(set(OPTIMIZERS) - {"lion_8bit"})


def weights() -> dict[str, torch.nn.Parameter]:
    """Two matrices of a LoRA layer as it starts, large enough for 8-bit state, and a bias."""
    torch.manual_seed(0)
    shapes = {"q.lora_A.default.weight": (64, 128), "q.lora_B.default.weight": (128, 64), "q.bias": (128,)}
    made = {name: torch.randn(shape) if "lora_A" in name else torch.zeros(shape) for name, shape in shapes.items()}
    return {name: torch.nn.Parameter(tensor) for name, tensor in made.items()}


def moved(optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(3):
        for parameter in named.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in named.items()}


@pytest.mark.parametrize("name", SAME)
def test_an_optimizer_moves_weights_as_that_of_transformers_does(name: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    spec = finetune_spec(training={"optimizer": name, "learningRate": 0.003, "weightDecay": 0.1})
    ours, theirs = weights(), weights()
    optimizer = make_optimizer(spec, ours)
    set_learning_rate(optimizer, spec.training.learning_rate)
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, learning_rate=0.003, use_cpu=True)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    groups: list[dict[str, Any]] = [
        {"params": [theirs[name] for name in theirs if name != "q.bias"], "weight_decay": 0.1},
        {"params": [theirs["q.bias"]], "weight_decay": 0.0},
    ]
    wanted = moved(kind(groups, **options), theirs)
    for key, found in moved(optimizer, ours).items():
        assert torch.allclose(found, wanted[key], atol=1e-6), (key, (found - wanted[key]).abs().max())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_matrix_that_starts_at_zero_learns_at_the_learning_rate(name: str) -> None:
    named = weights()
    optimizer = make_optimizer(finetune_spec(training={"optimizer": name, "learningRate": 0.003}), named)
    set_learning_rate(optimizer, 0.003)
    assert float(moved(optimizer, named)["q.lora_B.default.weight"].abs().mean()) > 0.001


def test_lora_plus_is_that_of_peft(tiny_llama: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(target_modules="all-linear", r=4)
    )
    theirs: Any = create_loraplus_optimizer(
        model=model, optimizer_cls=torch.optim.AdamW, lr=0.001, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    spec = finetune_spec(method={"lora": {"loraPlusRatio": 16}}, training={"weightDecay": 0.1, "learningRate": 0.001})
    ours = make_optimizer(spec, named)
    set_learning_rate(ours, 0.001)

    def rates(optimizer: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
        """By parameter: (learning rate, weight decay)."""
        return {
            id(parameter): (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    assert rates(ours) == rates(theirs)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_its_state_is_as_large_as_the_memory_estimate_says(name: str) -> None:
    spec = finetune_spec(training={"optimizer": name}, method={"type": "LoRA", "lora": {"rank": 16}})
    named = {part: torch.nn.Parameter(torch.zeros(shape)) for part, shape in {"A": (16, 4096), "B": (4096, 16)}.items()}
    optimizer = make_optimizer(spec, named)
    moved(optimizer, named)
    tensors, _ = optimizer_state(optimizer, named)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    trained = sum(parameter.numel() for parameter in named.values())
    assert size == pytest.approx(_optimizer(spec, trained).expected, rel=0.02)
