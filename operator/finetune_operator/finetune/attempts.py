"""The book-keeping between attempts: how one begins, and what is written down when one ends."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.finetunestatus import (
    AdapterStatus,
    BaseModelStatus,
    DatasetStatus,
    FineTuneStatus,
    RunStatus,
)
from finetune_operator.finetune import jobs
from finetune_operator.finetune.view import View, stage_of
from finetune_trainer.runspec import PrepareResult, TrainResult

Object = dict[str, Any]


def begin(view: View, base: FineTuneStatus, number: int) -> tuple[Object, RunStatus]:
    """The Job of attempt `number` in the stage that `base.run` is in, and the run with that attempt in it."""
    run = base.run or RunStatus()
    # Part of the run's identity once it is prepared; until then the newest one is used.
    image = run.trainer_image if run.id else view.settings.images.trainer
    stage = stage_of(run)
    name = jobs.job_name(view.parent.metadata.name, stage, run.id or run.inputs, number)
    spec = jobs.run_spec(
        view.parent,
        stage,
        name,
        view.settings,
        attempt=number,
        inputs=run.inputs,
        trainer_image=image,
        prepared=_prepared(base) if run.id else None,
        trained=_trained(base) if stage == "export" else None,
        # Only a micro batch that was halved is ordered; otherwise the trainer chooses by spec and estimate.
        micro_batch=run.micro_batch if run.out_of_memory_retries else None,
    )
    begun = run.model_copy(update={"attempt": number, "job_name": name, "trainer_image": image, "finished_at": None})
    return jobs.job(view.parent, spec, view.settings), begun


def settled(view: View) -> RunStatus:
    """The run once its current attempt has ended: GPU time and disruptions of that attempt are added up."""
    run, current = view.run, view.current
    if current is None:
        # Its Job was deleted from outside: what the status showed last is the best that is known.
        shown = view.status.cost.gpu_hours * 3600 if view.status.cost else 0.0
        return run.model_copy(update={"gpu_seconds": max(run.gpu_seconds, round(shown, 1))})
    used = run.gpu_seconds + (current.gpu_seconds(view.now) if run.finished_at is None else 0.0)
    return run.model_copy(update={"gpu_seconds": round(used, 1), "disruptions": run.disruptions + current.disruptions})


def interrupted(view: View) -> RunStatus:
    """The run when its current attempt, if there is one, was stopped without being at fault."""
    run = settled(view)
    unfinished = bool(run.job_name) and run.finished_at is None
    return run.model_copy(update={"job_name": "", "disruptions": run.disruptions + unfinished})


def _prepared(base: FineTuneStatus) -> PrepareResult:
    run = base.run or RunStatus()
    return PrepareResult(
        run_id=run.id,
        base_model=base.base_model or BaseModelStatus(),
        dataset=base.dataset or DatasetStatus(),
        estimate=base.estimate,
        total_steps=base.progress.total_steps if base.progress else 0,
    )


def _trained(base: FineTuneStatus) -> TrainResult:
    return TrainResult(adapter=base.adapter or AdapterStatus(), evaluation=base.evaluation)
