"""Who trains: our trainer and what it is compared with, each as the command that a person would type."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.trainer.process import LOSS, Signs
from bench.trainer.workload import MAX_LENGTH, Recipe

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Contestant:
    """`command` is asked for before every run, and leaves nothing of the one before."""

    name: str
    command: Callable[[], list[str]]
    signs: Signs
    environment: dict[str, str] = field(default_factory=dict)


def contestant(name: str, command: list[str], signs: Signs, work: Path, **environment: str) -> Contestant:
    """One that reads its rows with `datasets`: it starts as in a fresh container, without those of the run before."""
    cache = work / "datasets"

    def fresh() -> list[str]:
        shutil.rmtree(cache, ignore_errors=True)
        return command

    return Contestant(name, fresh, signs, {"HF_DATASETS_CACHE": str(cache), **environment})


TRAINER_STEPS = Signs(LOSS, ready=re.compile(r"\b0/\d+ \["))  # transformers' Trainer: its bar, then a line per step
OUR_STEPS = Signs(re.compile(r"step 1: first step|step (\d+)/\1 "), ready=re.compile(r"training begins"))


def naive(model: Path, data: Path, output: Path, recipe: Recipe) -> Contestant:
    command = [
        sys.executable, str(HERE / "naive.py"), "--model", str(model), "--data", str(data / "train.jsonl"),
        "--output", str(output), "--steps", str(recipe.steps), "--batch-size", str(recipe.batch_size),
        "--max-length", str(MAX_LENGTH), "--rank", str(recipe.rank), "--alpha", str(recipe.alpha),
        "--dropout", str(recipe.dropout), "--learning-rate", str(recipe.learning_rate),
    ]  # fmt: skip
    return contestant("plain loop", command, Signs(LOSS, ready=re.compile(r"^ready$")), output)


def trl_sft(model: Path, data: Path, output: Path, recipe: Recipe) -> Contestant:
    """`trl sft` with its own defaults for precision, padding and checkpointing; its batch of 8 rows is our batch.

    Given besides: the CPU, the same LoRA targets, the rows in their order, a line per step, no files in between.
    """
    command = [
        str(Path(sys.executable).with_name("trl")), "sft",
        "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output),
        "--use_peft", "--lora_target_modules", "all-linear", "--lora_r", str(recipe.rank),
        "--lora_alpha", str(recipe.alpha), "--lora_dropout", str(recipe.dropout),
        "--max_steps", str(recipe.steps), "--per_device_train_batch_size", str(recipe.batch_size),
        "--learning_rate", str(recipe.learning_rate), "--lr_scheduler_type", "constant",
        "--train_sampling_strategy", "sequential", "--use_cpu", "true",
        "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none",
    ]  # fmt: skip
    return contestant("trl sft", command, TRAINER_STEPS, output)
