"""Attention over packed samples that never lets one see another: each sample is attended on its own, with no mask.

A dense mask over a packed row costs T x T whatever is packed; this costs the sum of the samples' squares and uses the
fast causal kernel of every device. On CUDA one variable-length flash kernel does all samples at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from finetune_trainer.data.batches import Batch

NAME = "finetune_packed"
_lengths: tuple[int, ...] = ()


@contextmanager
def packed(batch: Batch) -> Iterator[None]:
    """Within it the model's attention is split at the batch's sample borders; backward must run within it too,
    because gradient checkpointing computes attention again."""
    global _lengths
    before, _lengths = _lengths, batch.lengths
    try:
        yield
    finally:
        _lengths = before


@contextmanager
def generating(network: Any) -> Iterator[None]:
    """Within it the model attends to a cache, as generation does, not to packed samples."""
    training_attention = network.config._attn_implementation
    if training_attention == NAME:
        network.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        network.set_attn_implementation(training_attention)


def lengths_now() -> tuple[int, ...]:
    """The lengths of the samples that are being computed."""
    return _lengths


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **other: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, T, d], key and value [1, kv heads, T, d] -> [1, T, heads, d].

    Raises: ValueError for what a plain causal kernel cannot do (soft caps, sinks, position biases): such a model
    trains in the padded layout.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if other.get(name) is not None:
            raise ValueError(f"packed attention has no {name}")
    if query.shape[0] != 1 or sum(_lengths) != query.shape[2] or key.shape[2] != query.shape[2]:
        raise ValueError(f"packed attention: {tuple(query.shape)} is not one row of samples {_lengths}")
    if query.is_cuda and query.dtype != torch.float32 and not dropout and query.shape[-1] == value.shape[-1]:
        return _varlen(query, key, value, scaling, sliding_window), None
    grouped = query.shape[1] != key.shape[1]
    pieces = []
    for q, k, v in zip(
        query.split(_lengths, dim=2), key.split(_lengths, dim=2), value.split(_lengths, dim=2), strict=True
    ):
        mask = _window(q.shape[2], sliding_window, q.device)
        pieces.append(
            scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    if sliding_window is None or length <= sliding_window:
        return None
    at = torch.arange(length, device=device)
    behind = at[:, None] - at[None, :]
    return (behind >= 0) & (behind < sliding_window)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    edges = torch.tensor((0, *_lengths), device=query.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    behind = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        edges,
        edges,
        max(_lengths),
        max(_lengths),
        scale=scaling,
        window_size=(behind, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def register() -> None:
    """Make NAME an attention implementation of transformers. It has no mask function, so no dense mask is built."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
