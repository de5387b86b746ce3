"""How long prepare takes for 50,000 rows: read, check, render with a chat template, tokenize, pack, write.

    python -m bench.prepare [--rows 50000] [--bound 20]

Rows are chats of 170 tokens on average, a few up to 550; the tokenizer is made on the spot. The start of Python is
included, downloads and uploads are not. Ends with 1 when it took longer than the bound, in seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_words(chance: random.Random) -> list[str]:
    syllables = [consonant + vowel for consonant in "bcdfgklmnprst" for vowel in "aeiou"]
    return ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(9000)]


def make_model(folder: Path, words: list[str], chance: random.Random) -> None:
    """A tokenizer with 8,192 words and a chat template, and as much of a config as prepare reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((" ".join(chance.choices(words, k=200)) for _ in range(2000)), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))


def make_rows(path: Path, count: int, words: list[str], chance: random.Random) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            size = min(512, max(20, int(math.exp(chance.gauss(math.log(110), 0.75)))))
            roles = {"system": ["be", "brief"], "user": chance.choices(words, k=size // 3)}
            roles["assistant"] = chance.choices(words, k=size // 2)
            messages = [{"role": role, "content": " ".join(said)} for role, said in roles.items()]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--bound", type=float, default=20, metavar="SECONDS")
    options = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as work:
        folder, words = Path(work), make_words(chance)
        make_model(folder / "model", words, chance)
        make_rows(folder / "rows.jsonl", options.rows, words, chance)
        command = ["-m", "finetune_trainer", "check-data", str(folder / "rows.jsonl"), "--model", str(folder / "model")]
        begun = time.monotonic()
        done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
        seconds = time.monotonic() - begun
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    tokens = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("tokens"))
    print(
        f"{options.rows} rows, {tokens} tokens: {seconds:.1f} s (bound {options.bound:.0f} s), "
        f"{used.ru_utime + used.ru_stime:.1f} s of CPU time on {os.cpu_count()} cores, {used.ru_maxrss / 1024:.0f} MB"
    )
    return int(seconds > options.bound)


if __name__ == "__main__":
    sys.exit(main())
