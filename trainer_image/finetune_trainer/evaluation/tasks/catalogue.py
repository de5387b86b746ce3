"""Which tasks lm-eval has, and which of them are not asked: what needs code from elsewhere, or runs what a model wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from finetune_operator.api.evaluation import EvaluationTask
from finetune_trainer.failures import INVALID_TASK, RunFailure

Index = Mapping[str, Entry]

HOME = Path(lm_eval.__file__).parent / "tasks"
SHOWN = 8  # names in a message

# Settings of a task that say what it needs, and why that is refused.
REFUSED = {
    "class": "is a program that fetches its own data, and data is fetched before a GPU is asked for; choose another task",
    "custom_dataset": "makes its data with a program, for which there is no digest; choose another task",
    "unsafe_code": "runs programs that the model writes, which a pod with your credentials must not; choose another task",
    "doc_to_image": "shows images, and only text is asked; choose another task",
    "doc_to_audio": "plays sound, and only text is asked; choose another task",
}


def every_task() -> TaskManager:
    """All tasks that lm-eval brings along: 15,000 files are read, which takes some seconds."""
    return TaskManager()


def tasks_in(folders: Iterable[str]) -> TaskManager:
    """The tasks in some of lm-eval's folders, as `folders_of` names them."""
    return TaskManager(include_defaults=False, include_path=[HOME / folder for folder in folders])


def check(asked: Iterable[EvaluationTask], index: Index) -> None:
    """Raises: RunFailure that names the task and what to ask instead."""
    for task in asked:
        if refusal := _refusal(task.name, index):
            raise RunFailure(INVALID_TASK, f"evaluation.tasks: {task.name} {refusal}")


def _refusal(name: str, index: Index) -> str:
    entry = index.get(name)
    if entry is None:
        near = get_close_matches(name, index, 4)
        return f"is no task of lm-eval {lm_eval.__version__}{f'; did you mean {_listed(near)}?' if near else ''}"
    if entry.kind is Kind.TAG:
        return f"is a label of tasks without a score together; name some of them: {_listed(sorted(entry.tags))}"
    if entry.kind is Kind.GROUP and not (entry.cfg or {}).get("aggregate_metric_list"):
        inside = sorted(leaf.name for leaf in leaves(name, index))
        return f"is a group without a score of its own; name some of its tasks: {_listed(inside)}"
    for leaf in leaves(name, index):
        for setting, why in REFUSED.items():
            if (leaf.cfg or {}).get(setting):
                return why if leaf.name == name else f"contains {leaf.name}, which {why}"
    return ""


def leaves(name: str, index: Index) -> Iterator[Entry]:
    """The tasks that a name stands for: itself, or those of the group."""
    for entry in _entries(name, index):
        if entry.kind in (Kind.TASK, Kind.PY_TASK):
            yield entry


def folders_of(name: str, index: Index) -> set[str]:
    """Where in lm-eval a task and all that belongs to it are defined."""
    return {entry.yaml_path.parent.relative_to(HOME).as_posix() for entry in _entries(name, index) if entry.yaml_path}


def _entries(name: str, index: Index) -> Iterator[Entry]:
    entry = index.get(name)
    if entry is None:
        return
    yield entry
    if entry.kind is Kind.TAG:
        inside: list[str] = sorted(entry.tags)
    elif entry.kind is Kind.GROUP:
        inside = [_name(item) for item in (entry.cfg or {}).get("task") or []]
    else:
        return
    for member in inside:
        yield from _entries(member, index)


def _name(item: str | dict[str, Any]) -> str:
    return item if isinstance(item, str) else str(item.get("task") or item.get("group"))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
