"""Prepare: everything that can be done, and everything that can go wrong, before a GPU is asked for.

Resolve the base model; fetch, check, render and tokenize the data; pack and upload it; estimate memory; look whether
the same run was done already. Runs on a CPU and never imports torch.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, TypeVar

from finetune_operator.api.finetunestatus import DatasetStatus, TaskDataStatus
from finetune_trainer.data.build import Built, build_dataset
from finetune_trainer.data.check import check_rows
from finetune_trainer.data.rows import DataFile
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.interruption import Sigterm
from finetune_trainer.memory.verdict import estimate_run
from finetune_trainer.methods.combinations import refusals
from finetune_trainer.report import Reporter
from finetune_trainer.results.outcome import finished_result
from finetune_trainer.runspec import PrepareResult, Result, Reused, RunSpec, run_id
from finetune_trainer.sources import basemodel, datasets
from finetune_trainer.storage.store import Store
from finetune_trainer.training.schedule import total_steps

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

WORK = Path(os.environ.get("FINETUNE_WORK", "/work"))


class Here(NamedTuple):
    """What is on this machine already, in place of the sources that the FineTune names."""

    base_model: Path | None = None
    train: list[DataFile] | None = None
    evaluation: list[DataFile] | None = None


def main(spec: RunSpec) -> Result:
    """Run the prepare stage; RunFailure says what is wrong with the FineTune."""
    Sigterm()  # ends the process at once: a container's first process would ignore the signal, and nothing is lost
    store = Store(spec.storage, secret_name=_secret_name(spec), told=Reporter(spec).waits)
    prepared = prepare(spec, store, WORK / "prepare")
    return Result(stage=spec.stage, job=spec.job, run_id=prepared.run_id, prepared=prepared)


def prepare(spec: RunSpec, store: Store, work: Path, here: Here | None = None) -> PrepareResult:
    """Everything before the GPU, with `work` as its scratch folder."""
    if refused := list(refusals(spec.spec)):
        raise RunFailure(UNSUPPORTED_COMBINATION, "\n".join(refused))
    shutil.rmtree(work, ignore_errors=True)
    here = here or Here()

    # Mirroring or hashing a large model takes minutes; a bad row is told before that.
    resolving = _in_background(
        lambda: basemodel.resolve(spec.spec.base_model, store, work / "base-model", here=here.base_model)
    )
    dataset = spec.spec.dataset
    tasks = _tasks(spec, store, work / "tasks")
    train = here.train or datasets.fetch(dataset.train, "train", store, work / "train")
    evaluation = here.evaluation
    if evaluation is None and dataset.evaluation is not None and dataset.evaluation.fraction is None:
        evaluation = datasets.fetch(dataset.evaluation, "evaluation", store, work / "evaluation")
    if not resolving.done():
        for files in filter(None, (train, evaluation)):
            check_rows(files, dataset, spec.spec.objective.type)

    base = resolving.result()
    log.info("base model: %s, %s parameters", base.status.digest, f"{base.status.parameters:,}")
    tokenizer = load_tokenizer(base.directory)
    if "GGUF" in spec.spec.output.exports:
        from finetune_trainer.memory.architecture import read_config
        from finetune_trainer.results.gguffile.make import refuse_early

        refuse_early(base.directory, read_config(base.directory), tokenizer, work)
    built = build_dataset(spec.spec, train, evaluation, tokenizer, base.directory, work)
    status = _upload(built, store).model_copy(update={"tasks": tasks})

    run = run_id(base.status.digest, status.digest, spec.spec, spec.trainer_image)
    training = spec.spec.training
    result = PrepareResult(
        run_id=run,
        base_model=base.status,
        dataset=status,
        estimate=estimate_run(base.directory, spec.spec, base.status.parameters, built.longest_row, built.learned),
        total_steps=total_steps(built.rows, training.batch_size, training.epochs, training.max_steps),
    )
    if done := finished_result(store, spec.model_copy(update={"prepared": result})):
        result = result.model_copy(
            update={"reused": Reused(adapter=done.adapter, evaluation=done.evaluation, report=done.report)}
        )
    log.info("prepared: run %s, %d steps%s", run, result.total_steps, ", trained before" if done else "")
    return result


def _tasks(spec: RunSpec, store: Store, work: Path) -> TaskDataStatus | None:
    if not spec.spec.evaluation.tasks:
        return None
    from finetune_trainer.evaluation.tasks.fetch import fetch_tasks

    return fetch_tasks(spec.spec.evaluation, store, work)


def _in_background(work: Callable[[], Answer]) -> Future[Answer]:
    """Start work on a thread that does not keep the process alive when something else fails."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised again by whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="base-model").start()
    return future


def _upload(built: Built, store: Store) -> DatasetStatus:
    from finetune_trainer import digest as digests

    files = digests.hash_tree(built.directory)
    digest = digests.tree_digest(files)
    prefix = f"datasets/{digests.hex_of(digest)}"
    if store.verify_tree(prefix) is None:
        store.upload_tree(built.directory, prefix, files=files)
    log.info("dataset: %s at %s", digest, store.uri(prefix))
    return built.status.model_copy(update={"digest": digest, "uri": store.uri(prefix)})


def _secret_name(spec: RunSpec) -> str:
    reference = spec.spec.output.s3.credentials_secret_ref
    return reference.name if reference else ""
