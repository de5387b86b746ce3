"""In prepare: find the tasks, fetch their data, try each one out, and leave all of it in the bucket by digest."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
from lm_eval.api.model import LM

from finetune_operator.api.evaluation import Evaluation, EvaluationTask
from finetune_operator.api.finetunestatus import TaskDataStatus
from finetune_trainer import digest as digests
from finetune_trainer.evaluation.tasks import catalogue
from finetune_trainer.evaluation.tasks.files import LIST, store
from finetune_trainer.evaluation.tasks.questions import Load, Loaded, load_task, score
from finetune_trainer.evaluation.tasks.results import Score, scores
from finetune_trainer.failures import INVALID_TASK, RunFailure
from finetune_trainer.sources import hub
from finetune_trainer.storage.store import Store

if TYPE_CHECKING:
    from datasets import DatasetDict

log = logging.getLogger(__name__)

TRIED = 2  # questions of each task


class Mute(LM):  # type: ignore[misc]
    """Answers at once and wrong: what a task needs in order to be asked and scored shows without a model."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [-1.0 for _ in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return ["nothing" for _ in requests]


def fetch_tasks(evaluation: Evaluation, bucket: Store, work: Path) -> TaskDataStatus:
    """Any of lm-eval's tasks, with its data from the hub."""
    os.environ.setdefault("HF_DATASETS_CACHE", str(work / "cache"))
    return leave_tasks(evaluation, catalogue.every_task(), from_hub, bucket, work / "files")


def leave_tasks(evaluation: Evaluation, manager: Any, data: Load, bucket: Store, folder: Path) -> TaskDataStatus:
    """The tasks' data in the bucket. Raises: RunFailure that names the task, or the gate about a metric that it has not."""
    catalogue.check(evaluation.tasks, manager.task_index)
    folders: set[str] = set()
    questions = 0
    for task in evaluation.tasks:
        loaded = _loaded(manager, task, data)
        tried = _tried(task, loaded)
        _check_gates(evaluation, task, tried)
        for leaf in loaded["tasks"].values():
            store(folder, leaf, task.limit)
            questions += min(len(leaf.eval_docs), task.limit or len(leaf.eval_docs))
        folders |= catalogue.folders_of(task.name, manager.task_index)
        log.info("tasks: %s with %s", task.name, ", ".join(one.metric for one in tried))
    _write_list(folder, evaluation.tasks, folders)
    files = digests.hash_tree(folder)
    digest = digests.tree_digest(files)
    prefix = f"datasets/{digests.hex_of(digest)}"
    if bucket.verify_tree(prefix) is None:
        bucket.upload_tree(folder, prefix, files=files)
    log.info("tasks: %d questions, %s at %s", questions, digest, bucket.uri(prefix))
    return TaskDataStatus(questions=questions, digest=digest, uri=bucket.uri(prefix))


def _write_list(folder: Path, tasks: Iterable[EvaluationTask], folders: set[str]) -> None:
    listed = {
        "harness": lm_eval.__version__,  # another version may ask in other words
        "folders": sorted(folders),
        "tasks": [task.model_dump(by_alias=True, exclude_none=True) for task in tasks],
    }
    (folder / LIST).write_text(json.dumps(listed, indent=1, sort_keys=True))


def _loaded(manager: Any, task: EvaluationTask, data: Load) -> Loaded:
    try:
        return load_task(manager, task, data)
    except (RunFailure, OSError):
        raise
    except Exception as error:
        raise _unusable(task, error) from error


def _tried(task: EvaluationTask, loaded: Loaded) -> list[Score]:
    """The metrics of a few questions that nobody answered: what is missing here would be missing after training."""
    try:
        return scores(task.name, score(Mute(), loaded, min(TRIED, task.limit or TRIED)))
    except Exception as error:
        raise _unusable(task, error) from error


def _unusable(task: EvaluationTask, error: Exception) -> RunFailure:
    """lm-eval's tasks are 15,000 small programs: whatever one of them raises, it cannot be asked."""
    log.info("tasks: %s", task.name, exc_info=error)
    if isinstance(error, ImportError) and error.name:
        why = f"needs the Python package {error.name}, which the trainer image does not have"
    else:
        why = f"cannot be asked: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return RunFailure(INVALID_TASK, f"evaluation.tasks: {task.name} {why}; choose another task")


def _check_gates(evaluation: Evaluation, task: EvaluationTask, tried: list[Score]) -> None:
    known = [one.metric for one in tried]
    for gate in evaluation.gates:
        if gate.metric.startswith(f"{task.name}/") and gate.metric not in known:
            raise RunFailure(
                INVALID_TASK,
                f"evaluation.gates: {gate.metric} is not measured; {task.name} has {', '.join(known)}: use one of them",
            )


def from_hub(config: Any) -> DatasetDict:
    """What a task's configuration says about its data, from the hub."""
    from datasets import DatasetDict, disable_progress_bars, load_dataset
    from huggingface_hub import HfApi

    disable_progress_bars()
    repo, name = config.dataset_path, config.dataset_name
    options = {key: value for key, value in (config.dataset_kwargs or {}).items() if key != "trust_remote_code"}
    with hub.explained("task", repo, "main", None, config.task):
        if "/" in repo and "revision" not in options:  # one without is a file format
            options["revision"] = HfApi().dataset_info(repo).sha
        try:
            found = load_dataset(repo, name, **options)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            raise RunFailure(
                INVALID_TASK,
                f"evaluation.tasks: {config.task} reads {repo} with a program of that repository, and "
                "code from there is never run; choose another task",
            ) from error
    if not isinstance(found, DatasetDict):
        raise TypeError(f"the data of {config.task} has no splits")
    return found
