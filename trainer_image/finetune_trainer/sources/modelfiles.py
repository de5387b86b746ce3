"""Which files of a model's folder are the model, and what its safetensors headers say. Standard library only: serving
uses it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

CONFIG = "config.json"
_SMALL = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "tokenizer.model", "spiece.model", "tekken.json",
    "chat_template.json", "chat_template.jinja", "*.safetensors.index.json",
)  # fmt: skip
_WEIGHTS = "*.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")  # loading one runs what is in it

Read = Callable[[str, int, int], bytes]
"""(path, offset, length) -> bytes of a model's file."""


def model_files(names: Iterable[str], remote_code: bool = False) -> list[str]:
    """The files that make up the model: config, tokenizer and safetensors in the folder itself, never a pickle.

    A repository that keeps its weights twice (Mistral's consolidated.safetensors) counts once. `remote_code`: Python
    files too.
    """
    top = sorted(name for name in names if "/" not in name)
    weights = [name for name in top if fnmatchcase(name, _WEIGHTS)]
    standard = [name for name in weights if name.startswith("model")]
    small = [name for name in top if any(fnmatchcase(name, pattern) for pattern in _SMALL)]
    code = [name for name in top if remote_code and name.endswith(".py")]
    return sorted({*(standard or [name for name in weights if name != "adapter_model.safetensors"]), *small, *code})


def is_weights(name: str) -> bool:
    return fnmatchcase(name, _WEIGHTS)


def missing(names: Iterable[str]) -> str:
    """What a folder lacks to be a model, as the end of a sentence; empty when it lacks nothing."""
    present = list(names)
    chosen = model_files(present)
    if CONFIG not in chosen:
        return "has no config.json: name the folder that holds it"
    if not any(is_weights(name) for name in chosen):
        pickles = [name for name in present if any(fnmatchcase(name, pattern) for pattern in _PICKLES)]
        if pickles:
            return (
                f"has its weights only as pickle ({pickles[0]}), which is never read: "
                "convert them to safetensors, or name a revision that has them"
            )
        return "has no *.safetensors: the weights are missing"
    if not any(
        name in chosen
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
    ):
        return "has no tokenizer: add tokenizer.json and tokenizer_config.json"
    return ""


def parameters(names: Iterable[str], read: Read) -> int:
    """Number of parameters, from the headers of the safetensors files. ValueError when a header is not sound."""
    return sum(_parameters(name, read) for name in names if is_weights(name))


def _parameters(name: str, read: Read) -> int:
    length = int.from_bytes(read(name, 0, 8), "little")
    if not 2 <= length <= 100 << 20:
        raise ValueError(f"{name} is not a safetensors file")
    header = json.loads(read(name, 8, length))
    return sum(math.prod(tensor["shape"]) for tensor_name, tensor in header.items() if tensor_name != "__metadata__")
