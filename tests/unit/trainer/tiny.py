"""Tiny models, tokenizers and prepared datasets, made on the spot: two layers of width 64, trained in seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "one",
    "two",
    "three",
    "four",
    "five",
]
VOCABULARY = 320


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "chat_template": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
                "{% if add_generation_prompt %}[assistant] {% endif %}",
            }
        )
    )


def make_llama(folder: Path, hidden: int = 64, layers: int = 2, **options: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_rows(count: int, seed: int = 0, packed: bool = True, longest: int = 24) -> list[dict[str, list[int]]]:
    """Random prompts with answers that are soon learned: they count up from 10."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for _ in range(int(random.integers(1, 4)) if packed else 1):
            prompt = random.integers(3, VOCABULARY, int(random.integers(2, longest // 2))).tolist()
            answer = [10 + place for place in range(len(prompt))]
            row["input_ids"] += [*prompt, *answer]
            row["labels"] += [*[-100] * len(prompt), *answer]
            row["seq_lengths"].append(2 * len(prompt))
        rows.append(row)
    return rows


def make_pairs(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random prompts with two answers of different lengths: the chosen one counts up from 10, the other from 40."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        sizes = random.integers(2, 12, 3)
        prompt = random.integers(60, VOCABULARY, sizes[0]).tolist()
        chosen, rejected = (
            [start + place for place in range(size)] for start, size in ((10, sizes[1]), (40, sizes[2]))
        )
        pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return pairs


def make_judged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same answers one by one, good and bad in turn."""
    return [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[answer], "label": good}
        for pair in make_pairs((count + 1) // 2, seed)
        for answer, good in (("chosen_ids", True), ("rejected_ids", False))
    ][:count]


def write_dataset(folder: Path, train: list[dict[str, Any]], evaluation: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("evaluation", evaluation)):
        if rows:
            kinds = {name: pa.bool_() if name == "label" else pa.list_(pa.int32()) for name in rows[0]}
            columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
            pq.write_table(pa.table(columns), folder / f"{split}-00000.parquet", compression="zstd")
    return folder


def finetune_spec(**parts: Any) -> Any:
    """A FineTuneSpec for a CPU; parts are merged into it (camelCase, one level deep)."""
    from finetune_operator.api.finetune import FineTuneSpec

    spec: dict[str, Any] = {
        "baseModel": {"s3": {"uri": "s3://models/tiny"}},
        "dataset": {"train": {"s3": {"uri": "s3://data/train.jsonl"}}},
        "method": {"type": "LoRA", "lora": {"rank": 4, "alpha": 8}},
        "training": {"maxSteps": 8, "batchSize": 4, "learningRate": 0.01, "precision": "FP32", "maxLength": 64},
        "resources": {"gpus": 0},
        "checkpoint": {"every": 3},
    }
    for name, value in parts.items():
        merge = isinstance(value, dict) and isinstance(spec.get(name), dict)
        spec[name] = {**spec[name], **value} if merge else value
    return FineTuneSpec.model_validate(spec)
