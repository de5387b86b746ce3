"""The GGUF file of a merged model, verified; and whether there can be one, which is told before a GPU is asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from finetune_trainer.data.tokenizer import ModelTokenizer, load_tokenizer
from finetune_trainer.evaluation.probeprompts import DEFAULT_PROMPTS
from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.results.gguffile import architectures, verify, vocabulary, writer

log = logging.getLogger(__name__)

SHORT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as llama.cpp's users name their files


class Made(NamedTuple):
    """A file that llama.cpp reads as transformers reads the model."""

    file: Path
    agreement: verify.Agreement


def refuse(config: architectures.Config, tokenizer: ModelTokenizer) -> None:
    """RunFailure when no GGUF file can be made of a model with this configuration and tokenizer."""
    found = [architectures.refusal(config), vocabulary.refusal(tokenizer)]
    if any(found):
        raise RunFailure(UNSUPPORTED_COMBINATION, "\n".join(filter(None, found)))


def refuse_early(folder: Path, config: architectures.Config, tokenizer: ModelTokenizer, scratch: Path) -> None:
    """Before there is anything to convert: what `refuse` says, and whether llama.cpp has the tokenizer's tokens.

    llama.cpp loads no tokenizer without a model, so it gets the smallest one.
    """
    refuse(config, tokenizer)
    file = scratch / "tokenizer.gguf"
    writer.write_tokenizer(folder, tokenizer, file)
    verify.refuse_other_tokens(file, tokenizer)
    file.unlink()


def make(source: Path, dtype: str, name: str, folder: Path, remote_code: bool) -> Made:
    """The model in `source`, whose weights are of `dtype`, as `<name>-<type>.gguf` in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(source)
    config = AutoConfig.from_pretrained(str(source), local_files_only=True, trust_remote_code=remote_code).to_dict()
    refuse(config, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{SHORT[dtype]}.gguf"
    writer.write(source, config, dtype, name, file)
    log.info("wrote %s, %.1f MB; llama.cpp is asked for its tokens and logits", file.name, file.stat().st_size / 1e6)
    model = AutoModelForCausalLM.from_pretrained(
        str(source), dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=remote_code
    ).eval()
    agreement = verify.verified(file, tokenizer, model, dtype, DEFAULT_PROMPTS)
    log.info("llama.cpp's and transformers' logits differ by %.2g standard deviations", agreement.logits)
    return Made(file, agreement)
