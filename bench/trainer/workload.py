"""What all contestants train: a Llama of 99.6M random parameters, and instructions as long as those of public datasets.

Everything follows from one seed. The model is Llama 2's shape made small: 32,000 words, embeddings and head apart, so
that the head's share of the work is that of small public models. Each token is one word, so lengths are known exactly.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

VOCABULARY = 32_000
MAX_LENGTH = 512
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "###", "Instruction:", "Response:")
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
TINY = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Recipe:
    """What is done with it, the same for all: the first `steps` batches of one pass over the rows, in a fixed order."""

    steps: int
    batch_size: int = 8
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    learning_rate: float = 2e-4
    seed: int = 42


def make_model(folder: Path, tiny: bool = False) -> int:
    """A model folder in bf16, as models are published; returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = TINY if tiny else SHAPE
    config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    _make_tokenizer(folder)
    return int(model.num_parameters())


def _words() -> list[str]:
    return [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]


def _make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *_words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL[:4]))
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **tokens})
    )


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Instructions and answers. Tokens of both: half have at most 98, a tenth more than 245, none more than MAX_LENGTH
    (126 on average), which is about what instruction datasets such as dolly and Alpaca come to. Words are as unevenly
    frequent as a language's.
    """
    chance = random.Random(seed)
    words = _words()
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(length: int) -> str:
        return " ".join(chance.choices(words, cum_weights=weights, k=length))

    rows = []
    for _ in range(count):
        length = min(MAX_LENGTH - 8, max(12, round(chance.lognormvariate(4.585, 0.71)) - 6))
        answer = max(4, round(length * chance.uniform(0.35, 0.85)))
        prompt = f"### Instruction: {text(length - answer)}\n\n### Response:\n"
        rows.append({"prompt": prompt, "completion": text(answer)})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def in_order_of_training(rows: list[dict[str, str]], recipe: Recipe) -> list[dict[str, str]]:
    """The rows as our trainer draws them, for contestants that read a file from its beginning."""
    from finetune_trainer.data.batches import batch_rows

    drawn = [
        index for step in range(recipe.steps) for index in batch_rows(step, recipe.batch_size, len(rows), recipe.seed)
    ]
    rest = sorted(set(range(len(rows))) - set(drawn))
    return [rows[index] for index in [*drawn, *rest]]
