"""The tasks' data as files: <task>/<split>.parquet, and tasks.json with how each task is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from finetune_trainer.evaluation.tasks.questions import splits

if TYPE_CHECKING:
    from datasets import DatasetDict

LIST = "tasks.json"


def store(folder: Path, task: Any, limit: int | None) -> None:
    """Write what is needed of a loaded task's data: questions, as many as are asked, and examples where there are any."""
    asked, examples = splits(task)
    shots, questions = task.config.num_fewshot, task.dataset[asked]
    pool = None if examples is None or examples == asked else task.dataset[examples]
    # A task's own program may choose among its questions, and examples may be drawn from all of them.
    if limit and task.config.process_docs is None and not (shots and examples == asked):
        questions = questions.select(range(min(limit, len(questions))))
    if pool is not None and not shots:
        pool = pool.select(range(min(1, len(pool))))
    here = folder / folder_name(task.task_name)
    here.mkdir(parents=True, exist_ok=True)
    for split, rows in ((asked, questions), (examples, pool)):
        if rows is not None:
            rows.to_parquet(here / f"{split}.parquet")


def stored(folder: Path, task: str) -> DatasetDict:
    """A task's data as it was stored."""
    from datasets import Dataset, DatasetDict

    files = sorted((folder / folder_name(task)).glob("*.parquet"))
    return DatasetDict({file.stem: Dataset(pq.read_table(file)) for file in files})


def folder_name(task: str) -> str:
    """A task's name as a folder's: lm-eval has names with slashes and colons."""
    return "".join(letter if letter.isalnum() or letter in "_-." else f"%{ord(letter):02x}" for letter in task)
