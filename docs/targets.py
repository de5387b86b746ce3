"""The table of docs/methods.md: what all-linear and IA3's default mean, for every family that the trainer knows."""

from __future__ import annotations

from typing import Any

from finetune_trainer.memory.architecture import Architecture, architecture
from finetune_trainer.memory.families import FAMILIES
from finetune_trainer.memory.trainable import ia3_modules

# Only names are shown, so any sizes do.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def targets_table() -> str:
    """One row for all families with the same layers."""
    families: dict[tuple[str, str], list[str]] = {}
    for kind in sorted(FAMILIES):
        experts = EXPERTS if FAMILIES[kind].experts else {}
        shape = architecture({"model_type": kind, **SIZES, **experts})
        assert shape
        families.setdefault((_names(shape), _ia3(shape)), []).append(kind)
    rows = [f"| {', '.join(kinds)} | {names} | {scaled} |" for (names, scaled), kinds in families.items()]
    return "\n".join(["| model types | `all-linear` | IA3 without `targetModules` |", "|---|---|---|", *rows])


def _names(shape: Architecture) -> str:
    names = [linear.name for linear in shape.linears]
    # where two layers have one name, their path tells them apart
    return " ".join(f"`{linear.path if names.count(linear.name) > 1 else linear.name}`" for linear in shape.linears)


def _ia3(shape: Architecture) -> str:
    targets, inputs = ia3_modules(shape, [], [])
    return " ".join(f"`{name}`{' (its input)' if name in inputs else ''}" for name in targets)
