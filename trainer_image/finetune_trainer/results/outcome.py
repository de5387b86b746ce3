"""What a run leaves under `runs/<run id>/`: run.json, report.html, and result.json once its adapter is whole."""

import logging
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from finetune_trainer.digest import hex_of
from finetune_trainer.evaluation.gates import judge
from finetune_trainer.evaluation.tasks.results import Measured
from finetune_trainer.failures import STORAGE_UNAUTHORIZED, STORAGE_UNAVAILABLE, UPLOAD_FAILED, RunFailure
from finetune_trainer.page.page import render
from finetune_trainer.page.story import Story
from finetune_trainer.results.eventfile import event_file
from finetune_trainer.runspec import RunSpec, TrainResult
from finetune_trainer.storage.store import Store

log = logging.getLogger(__name__)

STORE_IS_GONE = (STORAGE_UNAVAILABLE, STORAGE_UNAUTHORIZED, UPLOAD_FAILED)


def folder(run: RunSpec) -> str:
    assert run.prepared
    return f"runs/{run.prepared.run_id}"


def samples_key(run: RunSpec) -> str:
    return f"{folder(run)}/samples.json"


def finished_result(store: Store, run: RunSpec) -> TrainResult | None:
    """The result that this run left before, if its adapter is still whole; judged by the gates of now."""
    found = store.get_json(f"{folder(run)}/result.json")
    if found is None:
        return None
    try:
        result = TrainResult.model_validate(found)
    except ValidationError as error:
        log.warning("result.json of an earlier attempt cannot be read (%d errors); training again", error.error_count())
        return None
    if store.verify_tree(f"adapters/{hex_of(result.adapter.digest)}") is None:
        log.warning("the adapter of an earlier attempt is not whole any more; training again")
        return None
    asked = run.prepared.dataset.tasks if run.prepared else None
    if not _answered(store, run) or (asked and (result.evaluation is None or result.evaluation.tasks != asked.digest)):
        return None  # as with unmeasured gates: its last checkpoint is there, only the evaluation is done again
    gates, measured = run.spec.evaluation.gates, result.evaluation
    if measured is None or any(gate.metric not in measured.adapter for gate in gates):
        return None if gates else result  # its last checkpoint is there: only the evaluation is done again
    evaluation = judge(gates, measured.base, measured.adapter, measured.lower_is_better)
    evaluation = evaluation.model_copy(update={"tasks": measured.tasks})
    adapter = result.adapter.model_copy(update={"gate_passed": evaluation.passed})
    log.info("run %s is done already: adapter %s", result.adapter.run_id, result.adapter.digest)
    return result.model_copy(update={"evaluation": evaluation, "adapter": adapter})


def _answered(store: Store, run: RunSpec) -> bool:
    """Whether base and adapter have answered every prompt that is asked for now."""
    asked = set(run.spec.evaluation.samples)
    return not asked or asked <= {told["prompt"] for told in store.get_json(samples_key(run)) or []}


def write_tasks(store: Store, run: RunSpec, measured: Measured | None) -> list[dict[str, Any]]:
    """tasks.json: every metric of every task, with standard errors; status has room for some of them only."""
    if measured is None:
        return []
    found = [asdict(one) for one in measured.comparisons]
    store.put_json(f"{folder(run)}/tasks.json", {"digest": measured.digest, "metrics": found})
    return found


def write_run(store: Store, run: RunSpec, figures: dict[str, Any]) -> None:
    """run.json: what is trained, from what, and the figures of the newest attempt. No secret can be in it: specs hold none."""
    assert run.prepared
    store.put_json(
        f"{folder(run)}/run.json",
        {
            "runId": run.prepared.run_id,
            "job": run.job,
            "attempt": run.attempt,
            "trainerImage": run.trainer_image,
            "spec": run.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
            "prepared": run.prepared.model_dump(mode="json", by_alias=True, exclude_none=True),
            "figures": figures,
        },
    )


def write_report(store: Store, story: Story) -> str:
    """report.html, and the same curves for TensorBoard; returns the page's address, empty when it could not be written:
    an adapter is not lost for a page.
    """
    key = f"{folder(story.run)}/report.html"
    try:
        events = event_file(story.metrics, story.evaluation)
        store.put_bytes(f"{folder(story.run)}/tensorboard/events.out.tfevents.0.finetune", events)
        store.put_bytes(key, render(story).encode(), "text/html; charset=utf-8")
    except Exception as error:  # noqa: BLE001  # whatever the data brought with it
        log.warning("report: %s cannot be written: %s", store.uri(key), error)
        return ""
    log.info("report: %s", store.uri(key))
    return store.uri(key)


def write_failed_report(store: Store, story: Story, error: Exception) -> None:
    """report.html of a run that failed once it had made steps."""
    story.failure = str(error)
    if story.metrics and not (isinstance(error, RunFailure) and error.reason in STORE_IS_GONE):
        write_report(store, story)


def write_result(store: Store, run: RunSpec, result: TrainResult) -> TrainResult:
    """result.json: the run is done. Written last, when everything that it names is in the bucket."""
    store.put_json(f"{folder(run)}/result.json", result.model_dump(mode="json", by_alias=True, exclude_none=True))
    return result
