"""What a train Job needs on its disk: base model and prepared dataset, downloaded side by side while Python imports torch."""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from finetune_operator.api.finetunestatus import DatasetStatus, TaskDataStatus
from finetune_trainer.runspec import PrepareResult
from finetune_trainer.sources import basemodel
from finetune_trainer.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Downloads under way; a result waits for its own and raises its RunFailure."""

    _model: Future[Path]
    _dataset: Future[Path]
    _tasks: Future[Path]

    def model(self) -> Path:
        """The base model's folder, every file verified."""
        return self._model.result()

    def dataset(self) -> Path:
        """The prepared dataset's folder, every file verified."""
        return self._dataset.result()

    def tasks(self) -> Path:
        """The folder of what evaluation.tasks ask, every file verified."""
        return self._tasks.result()


def start_download(prepared: PrepareResult, store: Store, work: Path) -> Inputs:
    pool, asked = ThreadPoolExecutor(max_workers=2, thread_name_prefix="download"), prepared.dataset.tasks
    inputs = Inputs(
        pool.submit(_timed, "base model", lambda: basemodel.download(store, prepared.base_model, work / "model")),
        pool.submit(_timed, "dataset", lambda: _fetched(prepared.dataset, store, work / "dataset")),
        pool.submit(_timed, "tasks", lambda: _fetched(asked, store, work / "tasks")) if asked else Future(),
    )
    pool.shutdown(wait=False)
    return inputs


def downloaded(prepared: PrepareResult, work: Path) -> Inputs:
    """What another process on this node downloads: to be used once it says that it has."""
    model, dataset, tasks = Future[Path](), Future[Path](), Future[Path]()
    model.set_result(basemodel.folder_of(prepared.base_model, work / "model"))
    dataset.set_result(work / "dataset")
    tasks.set_result(work / "tasks")
    return Inputs(model, dataset, tasks)


def _fetched(data: DatasetStatus | TaskDataStatus, store: Store, folder: Path) -> Path:
    store.at(data.uri).download_tree("", folder, data.digest)
    return folder


def _timed(what: str, fetch: Callable[[], Path]) -> Path:
    started = time.monotonic()
    folder = fetch()
    log.info("%s: downloaded and verified in %.1f s", what, time.monotonic() - started)
    return folder


def copy_tokenizer(model: Path, dataset: Path, target: Path) -> None:
    """Tokenizer files and chat template beside the adapter, byte for byte; prepare's template where the model has none."""
    for file in sorted(model.iterdir()):
        if file.name in TOKENIZER_FILES:
            shutil.copyfile(file, target / file.name)
    template = dataset / CHAT_TEMPLATE
    if template.exists() and not (target / CHAT_TEMPLATE).exists():
        shutil.copyfile(template, target / CHAT_TEMPLATE)


CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        CHAT_TEMPLATE,
    }
)
