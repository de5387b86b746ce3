"""In train: base model and adapter answer the tasks that prepare left in the bucket."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_operator.api.evaluation import EvaluationTask
from finetune_trainer.evaluation.tasks.catalogue import tasks_in
from finetune_trainer.evaluation.tasks.files import LIST, stored
from finetune_trainer.evaluation.tasks.model import LoadedModel
from finetune_trainer.evaluation.tasks.questions import load_task, score
from finetune_trainer.evaluation.tasks.results import Measured, compared, scores
from finetune_trainer.methods.initialization import Tensors, as_base

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)


def ask(folder: Path, digest: str, model: PeftModel, initial: Tensors, answering: LoadedModel) -> Measured:
    """Every task of the folder, answered by adapter and base model; in all processes together."""
    listed = json.loads((folder / LIST).read_bytes())
    manager = tasks_in(listed["folders"])
    measured = Measured(digest)
    for task in (EvaluationTask.model_validate(entry) for entry in listed["tasks"]):
        started = time.monotonic()
        loaded = load_task(manager, task, lambda config: stored(folder, config.task))
        adapter = scores(task.name, score(answering, loaded, task.limit))
        with as_base(model, initial):
            base = scores(task.name, score(answering, loaded, task.limit))
        found = compared(base, adapter)
        measured.comparisons.extend(found)
        log.info("tasks: %s: %d questions in %.0f s", task.name, found[0].questions, time.monotonic() - started)
        for one in found:
            log.info("evaluation: %s %.4f, base model %.4f", one.metric, one.adapter, one.base)
    return measured
