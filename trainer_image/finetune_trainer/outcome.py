"""What a run leaves under `runs/<run id>/`: run.json, metrics.jsonl, and result.json once its adapter is whole."""

import json
import logging
from typing import Any

from pydantic import ValidationError

from finetune_trainer.digest import hex_of
from finetune_trainer.gates import judge
from finetune_trainer.runspec import RunSpec, TrainResult
from finetune_trainer.store import Store

log = logging.getLogger(__name__)


def folder(run: RunSpec) -> str:
    assert run.prepared
    return f"runs/{run.prepared.run_id}"


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
    gates, measured = run.spec.evaluation.gates, result.evaluation
    if measured is None or any(gate.metric not in measured.adapter for gate in gates):
        return None if gates else result  # its last checkpoint is there: only the evaluation is done again
    evaluation = judge(gates, measured.base, measured.adapter)
    adapter = result.adapter.model_copy(update={"gate_passed": evaluation.passed})
    log.info("run %s is done already: adapter %s", result.adapter.run_id, result.adapter.digest)
    return result.model_copy(update={"evaluation": evaluation, "adapter": adapter})


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


def write_metrics(store: Store, run: RunSpec, metrics: list[dict[str, Any]]) -> None:
    """metrics.jsonl: one line per optimizer step."""
    lines = "".join(json.dumps(line) + "\n" for line in metrics)
    store.put_bytes(f"{folder(run)}/metrics.jsonl", lines.encode(), "application/jsonl")


def write_result(store: Store, run: RunSpec, result: TrainResult) -> TrainResult:
    """result.json: the run is done. Written last, when everything that it names is in the bucket."""
    store.put_json(f"{folder(run)}/result.json", result.model_dump(mode="json", by_alias=True, exclude_none=True))
    return result
