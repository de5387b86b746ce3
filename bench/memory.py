"""What a micro batch really keeps and needs at most, beside the estimate, for every family of models, on a CPU.

    python -m bench.memory [--families llama,gpt2] [--methods LoRA,DoRA] [--precisions BF16,FP32] [--tokens 256]

Small random models are trained for two micro batches by the trainer's own code; during the second one every tensor that
comes and goes is counted. Nothing here knows the estimate's formulas. Where CUDA computes otherwise than a CPU, CUDA is
followed: autocast's float32 functions, dropout with a mask of one byte, attention's dropout inside the kernel. Ends with
1 when an estimate is more than 10 % from what is kept.
"""

from __future__ import annotations

import argparse
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

TOLERANCE = 0.10
TOKENS = 256
IDS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = IDS | {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
GROUPED = PLAIN | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 64}
GPT = IDS | {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 512}
EXPERTS = GROUPED | {"num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "granite", "smollm3", "qwen2", "olmo", "olmo2", "olmo3", "phi3", "phi"), GROUPED),
    **dict.fromkeys(("stablelm", "starcoder2", "cohere", "cohere2", "exaone4"), GROUPED),
    **dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3_text", "helium", "glm", "glm4", "seed_oss", "ernie4_5"), HEADS),
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": GPT | {"rotary_dim": 16},
    "gpt_neo": IDS | {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 512,
                      "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": PLAIN,
    "bloom": IDS | {"hidden_size": 256, "n_layer": 4, "n_head": 4},
    "falcon": IDS | {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "opt": PLAIN | {"ffn_dim": 512, "max_position_embeddings": 512, "word_embed_proj_dim": 256},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "granitemoe": EXPERTS | {"num_local_experts": 4},
    "olmoe": EXPERTS | {"num_experts": 4},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 128, "head_dim": 64},
    "gpt_oss": EXPERTS | {"num_local_experts": 4, "head_dim": 64},
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"type": "LoRA"},
    "LoRA without dropout": {"type": "LoRA", "lora": {"dropout": 0}},
    "LoRA on attention": {"type": "LoRA", "lora": {"targetModules": ATTENTION}},
    "LoRA in one layer": {"type": "LoRA", "lora": {"targetModules": ATTENTION, "layersToTransform": [3]}},
    "DoRA": {"type": "LoRA", "lora": {"useDora": True}},
    "AdaLoRA": {"type": "AdaLoRA"},
    "IA3": {"type": "IA3"},
    "IA3 of every layer": {"type": "IA3", "ia3": {"targetModules": ["all-linear"]}},
}
# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32": those that models use.
FLOAT32_ON_CUDA = ((torch, "pow"), (torch, "softmax"), (functional, "softmax"), (functional, "layer_norm"))


@dataclass(frozen=True)
class Measured:
    """Bytes beyond weights, adapter and gradients: kept for the backward pass, logits apart, and at most."""

    layout: str
    kept: int
    peak: int


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            key = storage._cdata
            if key in before or key in self._sizes:
                continue  # a view, or written in place
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def like_cuda() -> Iterator[None]:
    """Within it a CPU keeps what a GPU would."""
    from finetune_trainer.methods.dropout import Dropout
    from finetune_trainer.training import attention

    whole = functional.scaled_dot_product_attention

    def dropout(inputs: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.native_dropout(inputs, p, training)[0] if training and p else inputs

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Any:
        return whole(query, key, value, attn_mask, 0.0, **options)  # a kernel on a GPU keeps a seed, a CPU all scores

    with ExitStack() as patches:
        for owner, name in FLOAT32_ON_CUDA:
            patches.enter_context(patch.object(owner, name, _in_float32(getattr(owner, name))))
        patches.enter_context(patch.object(functional, "dropout", dropout))
        patches.enter_context(patch.object(Dropout, "forward", torch.nn.Dropout.forward))
        for owner in (functional, attention):
            patches.enter_context(patch.object(owner, "scaled_dot_product_attention", attend))
        yield


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def exact(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(lambda leaf: leaf.float() if _is_half(leaf) else leaf, (args, kwargs))
        return function(*args, **kwargs)

    return exact


def _is_half(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bfloat16


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", default=",".join(FAMILIES), help="default: all")
    parser.add_argument("--methods", default="LoRA", help=f"of {', '.join(METHODS)} (default: LoRA)")
    parser.add_argument("--precisions", default="BF16,FP32")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of the row (default: {TOKENS})")
    options = parser.parse_args(argv)
    quiet()
    print(f"{'':12} estimate / measured: kept for the backward pass, and at most without and with checkpointing")
    apart = 0.0
    for family in options.families.split(","):
        for method in options.methods.split(","):
            for precision in options.precisions.split(","):
                kept, peak, twice, layout = ratios(family, method, precision, options.tokens)
                apart = max(apart, abs(kept - 1))
                print(f"{family:12}{method:22}{precision} {layout:7}{kept:6.2f}{peak:6.2f}{twice:6.2f}", flush=True)
    print(f"kept: at most {100 * apart:.0f} % apart")
    return int(apart > TOLERANCE)


def ratios(family: str, method: str, precision: str, tokens: int) -> tuple[float, float, float, str]:
    """Estimate over measured: of what is kept, of the peak, and of the peak with checkpointing; and the layout."""
    spec = finetune(family, method, precision)
    config = model_config(family)
    plain, twice = (measure(config, spec, tokens, checkpointing) for checkpointing in (False, True))
    kept, peak = estimated(config, spec, tokens, False)
    return kept / plain.kept, peak / plain.peak, estimated(config, spec, tokens, True)[1] / twice.peak, plain.layout


def estimated(config: dict[str, Any], spec: Any, tokens: int, checkpointing: bool) -> tuple[float, float]:
    """Bytes that are kept, and at most, by the estimate."""
    from transformers import AutoConfig

    from finetune_trainer.memory.architecture import architecture
    from finetune_trainer.memory.estimate import Workload, estimate
    from finetune_trainer.memory.trainable import trainable_parameters

    shape = architecture(AutoConfig.for_model(**config).to_dict())
    assert shape
    parts = {part.name: part.expected for part in estimate(shape, Workload(spec, tokens), 1, checkpointing).parts}
    copies = parts["adapter and gradients"] - 8 * trainable_parameters(shape, spec)  # autocast's, made in each pass
    kept = parts["activations"] + copies
    return kept, kept + parts["logits"] + parts["backward pass"]


def model_config(family: str) -> dict[str, Any]:
    return {"model_type": family, **FAMILIES[family]}


def finetune(family: str, method: str, precision: str) -> Any:
    from finetune_operator.api.finetune import FineTuneSpec

    asked = METHODS[method]
    if asked == METHODS["LoRA"] and "num_experts_per_tok" in FAMILIES[family]:
        asked = METHODS["LoRA on attention"]  # experts are no layers
    source = {"s3": {"uri": "s3://random/weights"}}
    training = {"maxSteps": 1, "maxLength": TOKENS, "precision": precision}
    return FineTuneSpec.model_validate(
        {"baseModel": source, "dataset": {"train": source}, "method": asked, "training": training}
    )


def quiet() -> None:
    """transformers wants to be told what it is told by other means."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


def measure(config: dict[str, Any], spec: Any, tokens: int, checkpointing: bool, learned: int = 0) -> Measured:
    """Train two micro batches of one row; `learned`: its last tokens that are learned, 0: all of them."""
    from finetune_trainer.data.batches import IGNORE, Row
    from finetune_trainer.objectives import objective as objectives
    from finetune_trainer.training.precision import choose_precision

    precision = choose_precision(spec.training.precision, "cpu", True)
    model, layout = random_model(config, spec, precision.compute, checkpointing)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = np.arange(tokens, dtype=np.int32) % vocabulary
    labels = np.where(np.arange(tokens) < tokens - (learned or tokens), IGNORE, ids).astype(np.int32)
    rows = [Row(ids, labels, np.array([tokens], np.int32))]
    device = torch.device("cpu")
    objective = objectives.make_objective(spec, layout, device, precision)
    live, token_loss, kept = Live(), objectives.token_loss, 0

    def counted(*args: Any) -> Any:
        nonlocal kept
        result = token_loss(*args)
        width = 4 if precision.compute == "float32" else 2
        kept = live.now - width * vocabulary * result.tokens
        return result

    with like_cuda():
        objective.backward(model, rows, {"tokens": tokens}, 1.0, device)  # makes gradients, and what is made once
        with patch.object(objectives, "token_loss", counted), live:
            objective.backward(model, rows, {"tokens": tokens}, 1.0, device)
    return Measured(layout, kept, live.peak)


def random_model(config: dict[str, Any], spec: Any, dtype: str, checkpointing: bool) -> tuple[Any, str]:
    """A model with its adapter as the trainer makes them, and the layout that it is trained in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune_trainer.methods.initialization import initialize
    from finetune_trainer.training.device import use_gradient_checkpointing
    from finetune_trainer.training.layout import choose_layout

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=getattr(torch, dtype))
    base.requires_grad_(False)
    base.config.use_cache = False
    layout = choose_layout(base, spec)
    use_gradient_checkpointing(base, spec, checkpointing)
    model, _ = initialize(base, spec, 10, Path(), iter(()), None)
    return model.train(), layout


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


if __name__ == "__main__":
    sys.exit(main())
