"""A task with its data, ready to be asked: the data comes from wherever `Load` gets it."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lm_eval.api.task
import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from finetune_operator.api.evaluation import EvaluationTask
from finetune_trainer.failures import INVALID_TASK, RunFailure

if TYPE_CHECKING:
    from datasets import DatasetDict
    from lm_eval.api.model import LM

logging.getLogger("lm_eval").setLevel(logging.ERROR)
lm_eval.api.task.tqdm = lambda things, **_: things  # bars would fill a Job's log
os.environ["DISABLE_MULTIPROC"] = "1"  # resampling stays in this process, which may hold a GPU and must not fork then

Load = Callable[[Any], "DatasetDict"]  # of a task's configuration
Loaded = dict[str, Any]  # lm-eval's TaskDict: tasks, groups, group_map

SEED, EXAMPLES_SEED = 1234, 1234  # lm-eval's own, so that its numbers are ours
RESAMPLES = 1000  # for the standard error of the few metrics that have no formula for it


def load_task(manager: TaskManager, asked: EvaluationTask, load: Load) -> Loaded:
    """A task or group by its name. Raises: RunFailure where `fewShot` contradicts the task."""

    class Task(lm_eval.api.task.ConfigurableTask):  # type: ignore[misc]
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config={key: value for key, value in config.items() if key != "class"})

        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = load(self.config)

    kind = "group" if asked.name in manager.all_groups else "task"
    # A group around it, because lm-eval changes the class of a known task only as a member of one.
    loaded: Loaded = manager.load([{"group": "asked", "task": [{kind: asked.name, "class": Task}]}])
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own == 0 and asked.few_shot:
            raise RunFailure(
                INVALID_TASK,
                f"evaluation.tasks: {task.task_name} is always asked without examples; remove fewShot of {asked.name}",
            )
        task.set_config("num_fewshot", (own or 0) if asked.few_shot is None else asked.few_shot)
        task.set_fewshot_seed(EXAMPLES_SEED)
    return loaded


def score(model: LM, loaded: Loaded, limit: int | None) -> dict[str, Any]:
    """lm-eval's results of a model on a loaded task."""
    random.seed(SEED)
    np.random.seed(SEED)
    found: dict[str, Any] = evaluate(model, loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
    return found


def splits(task: Any) -> tuple[str, str | None]:
    """The splits that questions and examples are taken from; None: the examples are in the task itself."""
    config = task.config
    asked = config.test_split if config.test_split is not None else config.validation_split
    if config.fewshot_config.split is not None:
        return asked, config.fewshot_config.split
    if config.fewshot_config.samples is not None:
        return asked, None
    every = (config.training_split, config.validation_split, config.test_split)
    return asked, next(split for split in every if split is not None)
