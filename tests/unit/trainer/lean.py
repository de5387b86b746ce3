"""What a run of one process does up to its first step, for every family: how much it imported, and whether it is right.

python -m tests.unit.trainer.lean: prints it as JSON, from a process that has imported nothing else.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from finetune_trainer.methods import initialization
from finetune_trainer.training import optimizers
from finetune_trainer.training.eager import no_compiler
from finetune_trainer.training.precision import Precision
from finetune_trainer.training.quantization import load_base_model

from .families import FAMILIES
from .tiny import finetune_spec

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "networkx",
         "bitsandbytes", "triton", "trl", "datasets", "pandas", "scipy")  # fmt: skip


def step_of(family: str) -> list[str]:
    """The losses of two steps of a tiny model with LoRA, to the last bit."""
    from peft import LoraConfig
    from safetensors.torch import save_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    spec = finetune_spec()
    with TemporaryDirectory() as folder:
        with no_compiler():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
        model.config.to_json_file(f"{folder}/config.json")
        save_model(model, f"{folder}/model.safetensors", {"format": "pt"})
        model = load_base_model(Path(folder), spec, Precision("float32", scaled=False), torch.device("cpu"))
    wrapped = initialization._wrap(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"), spec)
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    optimizer, losses = optimizers.make_optimizer(spec, trained), []
    ids = torch.arange(1, 13)[None]
    for _ in range(2):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        with no_compiler():
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def quantized_layers() -> list[str]:
    """The kinds of the layers that LoRA makes of a 4-bit model, in a process where PEFT saw none before."""
    import bitsandbytes
    from peft import LoraConfig

    class Model(torch.nn.Module):
        config: Any = None
        is_loaded_in_4bit = True

        def __init__(self) -> None:
            super().__init__()
            self.layer = bitsandbytes.nn.Linear4bit(8, 8)

    wrapped = initialization._wrap(Model(), LoraConfig(target_modules=["layer"]), finetune_spec())  # type: ignore[arg-type]
    return [
        f"{type(module).__module__}.{type(module).__name__}"
        for module in wrapped.modules()
        if "Linear4bit" in type(module).__name__
    ]


def compiled() -> bool:
    """Whether torch compiles after all when a model asks for it."""

    @torch.compile(backend="eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    return torch.equal(double(torch.ones(2)), torch.full((2,), 2.0)) and "torch._dynamo" in sys.modules


def masked() -> list[list[bool]]:
    """A mask by vmap, the one thing for which transformers takes a name out of the compiler."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask = sdpa_mask(1, 3, 3, mask_function=causal_mask_function, allow_is_causal_skip=False, use_vmap=True)
    return [[bool(value) for value in row] for row in mask[0, 0]]


def main() -> None:
    from finetune_trainer.training.startup import import_libraries

    import_libraries(processes=1)
    found: dict[str, Any] = {"losses": {family: step_of(family) for family in FAMILIES}}
    found["imported"] = [name for name in HEAVY if name in sys.modules]
    found["left"] = [
        name for name, module in sys.modules.items() if module is None or type(module).__name__ == "Unloaded"
    ]
    found["distributed"] = torch.distributed.is_available()
    found["mask"] = masked()
    found["compiled"] = compiled()
    found["quantized"] = quantized_layers()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
