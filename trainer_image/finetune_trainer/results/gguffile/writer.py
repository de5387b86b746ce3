"""Writes the GGUF file of a model's folder, one tensor in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)

from finetune_trainer.data.tokenizer import ModelTokenizer, load_tokenizer
from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.results.gguffile.architectures import ARCHITECTURES, CONVERT, Config, describe, rope_factors
from finetune_trainer.results.gguffile.vocabulary import rows_of, special_tokens, vocabulary_of

if TYPE_CHECKING:
    import torch

FILE_TYPES = {
    "float32": (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    "float16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "bfloat16": (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
}


class Tensor(NamedTuple):
    """A tensor of the file; `values` reads it."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    values: Callable[[], np.ndarray[Any, Any]]


def write(folder: Path, config: Config, dtype: str, name: str, file: Path) -> None:
    """The model in `folder` (safetensors, tokenizer) as `file`, matrices in `dtype`, vectors in float32."""
    kind, (file_type, matrices) = ARCHITECTURES[config["model_type"]], FILE_TYPES[dtype]
    with ExitStack() as opened:
        tensors = list(_tensors(folder, config, matrices, opened))
        writer = GGUFWriter(file, MODEL_ARCH_NAMES[kind.arch])
        writer.add_file_type(file_type)
        _write(writer, name, folder, config, load_tokenizer(folder), tensors)


def write_tokenizer(folder: Path, tokenizer: ModelTokenizer, file: Path) -> None:
    """A tokenizer with the smallest model that llama.cpp loads: one layer of zeros, 32 wide."""
    rows = rows_of(tokenizer)
    narrow = GGMLQuantizationType.F16
    shapes = {
        "token_embd": (rows, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        **{f"blk.0.{matrix}": (32, 32) for matrix in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")},
    }  # fmt: skip
    tensors = [Tensor(f"{name}.weight", shape, *_zeros(shape, narrow)) for name, shape in shapes.items()]
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": rows, "max_position_embeddings": 512,
    }  # fmt: skip
    _write(GGUFWriter(file, MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA]), "tokenizer", folder, config, tokenizer, tensors)


def _zeros(
    shape: tuple[int, ...], matrices: GGMLQuantizationType
) -> tuple[GGMLQuantizationType, Callable[[], np.ndarray[Any, Any]]]:
    if len(shape) == 1:
        return GGMLQuantizationType.F32, lambda: np.zeros(shape, np.float32)
    return matrices, lambda: np.zeros(shape, np.float16)


def _write(
    writer: GGUFWriter, name: str, folder: Path, config: Config, tokenizer: ModelTokenizer, tensors: Sequence[Tensor]
) -> None:
    rows = int(config["vocab_size"])
    writer.add_type("model")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    describe(writer, config)
    vocabulary_of(tokenizer, rows).describe(writer, name)
    special_tokens(folder, tokenizer, rows).add_to_gguf(writer, quiet=True)
    for tensor in tensors:
        size = (4 if tensor.type == GGMLQuantizationType.F32 else 2) * math.prod(tensor.shape)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.values())
    writer.close()


def _tensors(folder: Path, config: Config, matrices: GGMLQuantizationType, opened: ExitStack) -> Iterator[Tensor]:
    from safetensors import safe_open

    kind = ARCHITECTURES[config["model_type"]]
    names = get_tensor_name_map(kind.arch, int(config["num_hidden_layers"]))
    for factors, each in rope_factors(config).items():
        values = np.array(each, dtype=np.float32)
        yield Tensor(factors, values.shape, GGMLQuantizationType.F32, values.copy)
    for path in sorted(folder.glob("*.safetensors")):
        weights = opened.enter_context(safe_open(str(path), "pt"))
        for key in sorted(weights.keys()):
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise RunFailure(
                    UNSUPPORTED_COMBINATION,
                    f"output.exports: GGUF has no place for {key} of model type {config['model_type']}; {CONVERT}",
                )
            shape = tuple(weights.get_slice(key).get_shape())
            narrow = matrices if len(shape) > 1 else GGMLQuantizationType.F32  # as llama.cpp computes with vectors
            yield Tensor(name, shape, narrow, _reader(weights, key, narrow, config))


def _reader(weights: Any, key: str, narrow: GGMLQuantizationType, config: Config) -> Callable[[], np.ndarray[Any, Any]]:
    def read() -> np.ndarray[Any, Any]:
        return _array(_converted(weights.get_tensor(key), key, config), narrow)

    return read


def _converted(tensor: torch.Tensor, key: str, config: Config) -> torch.Tensor:
    """A weight as llama.cpp wants it."""
    kind = ARCHITECTURES[config["model_type"]]
    if kind.norm_offset and key.endswith("norm.weight"):
        return tensor.float() + 1
    found = re.search(r"\.self_attn\.([qk])_proj\.", key)
    if not kind.neighbours or found is None:
        return tensor
    heads = config["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _array(tensor: torch.Tensor, narrow: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    import torch

    if narrow == GGMLQuantizationType.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    wanted = torch.float16 if narrow == GGMLQuantizationType.F16 else torch.float32
    return tensor.to(wanted).contiguous().numpy()
