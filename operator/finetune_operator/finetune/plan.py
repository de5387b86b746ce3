"""Decides what to do about a FineTune: rules that are asked in order, the first that has an answer wins.

Pure: a View goes in, a Plan comes out. Every rule starts from the status as it was written last and answers the whole
next status, so that a Plan that was carried out half is simply made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune_operator import labels, times
from finetune_operator.api.common import seconds
from finetune_operator.api.finetunestatus import FineTuneStatus, ProgressStatus, RunStatus
from finetune_operator.event import Event
from finetune_operator.finetune import attempts, exports, giveup, limits, observe, retry, status
from finetune_operator.finetune.view import View, stage_of
from finetune_operator.reasons import of_failure, with_hint

Object = dict[str, Any]

DEFAULT_TTL = "1h"
SAME_RUN = "SameRunElsewhere"
TWIN_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """What to do: delete these Jobs, create that one, then write this status, then post these events."""

    status: FineTuneStatus
    create: Object | None = None
    delete: tuple[Object, ...] = ()
    events: tuple[Event, ...] = ()
    again: float | None = None  # seconds until time alone changes something
    failure: str = ""  # reason of an attempt that failed, for the metrics


def plan(view: View) -> Plan:
    """The first rule that applies, its status completed with everything that follows from it."""
    chosen = next(answer for answer in (rule(view) for rule in RULES) if answer is not None)
    return replace(chosen, status=status.complete(view, chosen.status))


# ---- the rules -------------------------------------------------------------------------------------------------------


def start_new_run(view: View) -> Plan | None:
    """First sight, or an edit of what is trained: cancel what runs for other inputs and prepare anew."""
    if view.status.run is not None and view.run.inputs == view.inputs:
        return None
    before = view.status
    run = RunStatus(inputs=view.inputs, started_at=times.rfc3339(view.now))
    fresh = _updated(
        _with_history(view, "Cancelled", "Edited") if _unfinished(before) else before,
        run=run,
        # The adapter, its evaluation and the history stay: what is served goes on being served.
        progress=None,
        dataset=None,
        estimate=None,
        base_model=None,
        cost=None,
    )
    cancelled = tuple(job for job in view.jobs if job["metadata"]["labels"].get(labels.INPUTS) != view.inputs)
    note = "spec was edited: the run is cancelled and a new one starts; the last adapter stays"
    events = (Event("Cancelled", note),) if _unfinished(before) else ()
    if view.parent.spec.suspend:
        return replace(_suspended(view, fresh), delete=cancelled, events=events)
    begun = _begin(view, fresh, 1)
    return replace(begun, delete=cancelled, events=events + begun.events)


def stay_finished(view: View) -> Plan | None:
    """A run that ended stays ended, whatever becomes of its Jobs; they are deleted once their logs are old."""
    if view.run.finished_at is None:
        return None
    if view.status.phase == "Failed" and (view.parent.spec.suspend or _may_go_on(view)):
        return None
    ttl = seconds(view.parent.spec.ttl_after_finished or DEFAULT_TTL)
    left = ttl - (view.now - times.parse(view.run.finished_at)).total_seconds()
    if left > 0:
        return Plan(view.status, again=left)
    return Plan(view.status, delete=view.jobs)


def export_anew(view: View) -> Plan | None:
    """spec.output was edited after training: make what it asks for now. Nothing is trained again for it."""
    asked, spec = exports.asked(view.parent.spec), view.parent.spec
    if view.stage != "export" or asked == view.run.exports or spec.suspend or not exports.allowed(view.status):
        return None
    if not asked and view.status.phase == "Succeeded":
        return None  # what was made stays
    run = attempts.interrupted(view) if view.run.finished_at is None else view.run
    known = _updated(view.status, run=run.model_copy(update={"exports": asked}))
    if not asked:
        done = _succeed(view, known, "Trained", "spec.output asks for no export any more", ())
    else:
        again = run.model_copy(update={"exports": asked, "finished_at": None})
        done = _begin(view, _updated(known, run=again), view.run.attempt + 1)
    return replace(done, delete=_active(view))


def suspend(view: View) -> Plan | None:
    """spec.suspend: the Job goes, its pod saves a checkpoint on SIGTERM and frees the GPU."""
    if not view.parent.spec.suspend:
        return None
    if view.status.phase == "Suspended" and view.current is None:
        return _suspended(view, view.status)
    # A failed run that is suspended and resumed is tried again with a fresh budget of retries.
    again = {"finished_at": None, "infrastructure_retries": 0, "out_of_memory_retries": 0}
    run = attempts.interrupted(view).model_copy(update=again if view.run.finished_at else {})
    stopped = _suspended(view, _updated(view.status, run=run))
    event = Event("Suspended", "spec.suspend is true: the run is stopped with a checkpoint")
    return replace(stopped, delete=_active(view), events=(event,))


def keep_within_limits(view: View) -> Plan | None:
    """activeDeadline and budget: stop with a checkpoint."""
    if view.run.finished_at is not None or _has_result(view):
        return None
    exceeded = limits.exceeded(view)
    if exceeded is None:
        return None
    return replace(_fail(view, *exceeded), delete=_active(view))


def go_on(view: View) -> Plan | None:
    """No attempt exists: after a suspension, after a limit was raised, or because somebody deleted the Job."""
    if view.current is not None and view.run.finished_at is None:
        return None
    run = attempts.interrupted(view).model_copy(update={"finished_at": None})
    if view.status.phase in ("Suspended", "Failed"):
        # As with a Job, activeDeadline counts from the resumption.
        run = run.model_copy(update={"started_at": times.rfc3339(view.now)})
    begun = _begin(view, _updated(view.status, run=run), view.run.attempt + 1)
    if view.run.job_name and view.run.finished_at is None:
        note = f"Job {view.run.job_name} was deleted from outside; the run goes on from its last checkpoint"
        return replace(begun, events=(Event("JobDeleted", note, "Warning"), *begun.events))
    return begun


def take_up_preparation(view: View) -> Plan | None:
    """Prepared: train, unless the bucket holds the result already or the run cannot fit."""
    attempt = view.current
    if attempt is None or attempt.result is None or attempt.result.prepared is None or view.stage != "prepare":
        return None
    prepared = attempt.result.prepared
    run = attempts.settled(view).model_copy(update={"id": prepared.run_id, "attempt": 0, "job_name": ""})
    known = _updated(
        view.status,
        run=run,
        base_model=prepared.base_model,
        dataset=prepared.dataset,
        estimate=prepared.estimate,
        progress=ProgressStatus(total_steps=prepared.total_steps),
    )
    data = f"{prepared.dataset.samples} samples, {prepared.dataset.tokens} tokens"
    event = Event("Prepared", f"data and base model are checked: {data}; the run is {prepared.run_id}")
    if prepared.reused is not None:
        note = f"run {prepared.run_id} is in the bucket already, verified: nothing is trained again"
        made = prepared.reused
        run = run.model_copy(update={"report": made.report})
        reused = _updated(known, run=run, adapter=made.adapter, evaluation=made.evaluation, progress=None)
        return _export_or_succeed(view, reused, "ReusedExisting", note, (event,))
    if prepared.estimate is not None and prepared.estimate.verdict == "DoesNotFit":
        failed = _fail(
            view, "DoesNotFit", prepared.estimate.message or "the run does not fit in resources.gpuMemory", known
        )
        return replace(failed, events=(event, *failed.events))
    begun = _begin(view, known, 1)
    return replace(begun, events=(event, *begun.events))


def take_up_training(view: View) -> Plan | None:
    """Trained: the adapter is uploaded, verified and evaluated."""
    attempt = view.current
    if attempt is None or attempt.result is None or attempt.result.trained is None or view.stage != "train":
        return None
    trained = attempt.result.trained
    before = attempt.progress or view.status.progress or ProgressStatus()
    progress = before.model_copy(
        update={
            "step": trained.steps,
            "total_steps": trained.steps,
            "loss": trained.final_loss if trained.final_loss is not None else before.loss,
            "eta_seconds": None,
            "tracking": trained.tracking,
        }
    )
    run = attempts.settled(view).model_copy(
        update={
            "resumed_from_step": trained.resumed_from_step,
            "micro_batch": trained.micro_batch or view.run.micro_batch,
            "report": trained.report,
        }
    )
    known = _updated(view.status, run=run, progress=progress, adapter=trained.adapter, evaluation=trained.evaluation)
    note = f"adapter {trained.adapter.digest} is at {trained.adapter.uri}"
    missed = tuple(
        Event("TrackingIncomplete", f"{t.name}: {t.message}", "Warning") for t in trained.tracking if t.message
    )
    return _export_or_succeed(view, known, "Trained", note, missed)


def take_up_exports(view: View) -> Plan | None:
    """Exported: each was verified and says where it is."""
    attempt = view.current
    if attempt is None or attempt.result is None or attempt.result.exported is None or view.stage != "export":
        return None
    made = attempt.result.exported.exports
    known = _updated(view.status, run=attempts.settled(view), exports=made)
    return _succeed(view, known, "Exported", "; ".join(f"{export.type} is at {export.uri}" for export in made), ())


def take_up_failure(view: View) -> Plan | None:
    """The attempt failed: once more, or for good, as reasons.py says."""
    attempt = view.current
    if attempt is None or attempt.state != "Failed":
        return None
    decision = retry.decide(view, attempt)
    if not decision.again:
        return replace(_fail(view, attempt.reason, decision.message), delete=_stuck(view), failure=attempt.reason)
    if decision.pause > 0:
        # The failure is shown while the pause lasts; the phase stays what it was.
        paused = _updated(view.status, reason=attempt.reason, message=decision.message)
        return Plan(paused, again=decision.pause)
    begun = _begin(view, _updated(view.status, run=decision.run), view.run.attempt + 1)
    if begun.create is None:
        # The attempt is not over as long as it has no successor, so its failure is not counted yet.
        return replace(begun, status=_updated(begun.status, run=view.run))
    event = Event("Retrying", decision.message, "Warning")
    return replace(begun, delete=_stuck(view), events=(event, *begun.events), failure=attempt.reason)


def follow(view: View) -> Plan | None:
    """The attempt waits or runs: show how far it is."""
    lost = giveup.seconds_until_lost(view.current, view.now) if view.current else None
    moments = [s for s in (limits.seconds_left(view), lost) if s is not None]
    seen = status.underway(view)
    return Plan(seen, again=min(moments, default=None), events=tuple(_came_up(view, seen)))


def _came_up(view: View, seen: FineTuneStatus) -> Iterator[Event]:
    """What happened to the attempt since the status was written, and is no failure."""
    before, current = view.status, view.current
    if seen.reason == "StorageUnavailable" and before.reason != seen.reason:
        yield Event(seen.reason, seen.message, "Warning")
    if seen.phase == "Queued" and before.phase in ("Training", "Evaluating") and current and current.interruption:
        reason, message = current.interruption
        yield Event(reason, f"{message.rstrip('. ')}; the next pod goes on from the last checkpoint", "Warning")


RULES: tuple[Callable[[View], Plan | None], ...] = (
    start_new_run,
    export_anew,
    stay_finished,
    suspend,
    keep_within_limits,
    go_on,
    take_up_preparation,
    take_up_training,
    take_up_exports,
    take_up_failure,
    follow,
)


# ---- the moves that rules make ---------------------------------------------------------------------------------------


def _begin(view: View, base: FineTuneStatus, number: int) -> Plan:
    """Start attempt `number` of the stage that `base.run` is in, as soon as the pod of the last one has ended."""
    run = base.run or RunStatus()
    training = stage_of(run) == "train"
    if training and view.holding:
        message = f"waits until pod {view.holding[0]} of the attempt before has saved its checkpoint and ended"
        waiting = _updated(base, phase="Queued", reason="WaitingForPod", message=message)
        return Plan(waiting, again=5.0)
    if training and view.twin:
        message = f"{view.twin} trains the same run; its adapter is taken over when it is done"
        return Plan(_updated(base, phase="Queued", reason=SAME_RUN, message=message), again=TWIN_SECONDS)
    if training and view.status.reason == SAME_RUN:
        # The other one has ended: what it left in the bucket is found by preparing again.
        base = _updated(base, run=run.model_copy(update={"id": ""}))
        number = 1 + max((int(job["metadata"]["labels"][labels.ATTEMPT]) for job in view.jobs), default=0)
        run = base.run or RunStatus()
    created, run = attempts.begin(view, base, number)
    name = created["metadata"]["name"]
    phase, event = {
        "prepare": ("Preparing", Event("Preparing", f"data and base model are being checked, Job {name}")),
        "train": ("Queued", Event("TrainingStarted", f"training starts: attempt {number}, Job {name}")),
        "export": ("Exporting", Event("Exporting", f"{exports.names(view.parent.spec)}: attempt {number}, Job {name}")),
    }[stage_of(run)]
    begun = _updated(base, run=run, phase=phase, reason="Starting", message=f"Job {name} is created")
    return Plan(begun, create=created, events=(event,))


def _export_or_succeed(view: View, known: FineTuneStatus, reason: str, message: str, events: tuple[Event, ...]) -> Plan:
    """The adapter is there: make what is asked for from it, or be done."""
    asked = exports.asked(view.parent.spec)
    allowed = exports.allowed(known)
    run = (known.run or RunStatus()).model_copy(
        update={"trained_at": times.rfc3339(view.now), "exports": asked if allowed else ""}
    )
    known = _updated(known, run=run, exports=[])
    if not asked or not allowed:
        note = f"{message}; nothing is exported, because its gates were not passed" if asked else message
        return _succeed(view, known, reason, note, events)
    begun = _begin(view, known, 1)
    return replace(begun, events=(*events, Event(reason, message), *begun.events))


def _succeed(view: View, known: FineTuneStatus, reason: str, message: str, events: tuple[Event, ...]) -> Plan:
    done = _finished(view, known, "Succeeded", reason, message)
    final = [*events, Event("Succeeded", message)]
    if done.adapter is not None and done.adapter.gate_passed is False:
        failed = "; ".join(
            g.message or g.metric for g in (done.evaluation.gates if done.evaluation else []) if not g.passed
        )
        final.append(Event("GateNotPassed", f"the adapter is not served: {failed}", "Warning"))
    return Plan(done, events=tuple(final), again=_ttl(view))


def _fail(view: View, reason: str, message: str, known: FineTuneStatus | None = None) -> Plan:
    text = with_hint(message, of_failure(reason).hint)
    base = known if known is not None else _updated(view.status, run=attempts.settled(view))
    failed = _finished(view, base, "Failed", reason, text)
    return Plan(failed, events=(Event(reason, text, "Warning"),), again=_ttl(view))


def _finished(view: View, base: FineTuneStatus, result: str, reason: str, message: str) -> FineTuneStatus:
    run = (base.run or RunStatus()).model_copy(update={"finished_at": times.rfc3339(view.now)})
    ended = _updated(base, run=run, phase=result, reason=reason, message=message)
    return status.with_history(ended, result, reason, view.now)


def _with_history(view: View, result: str, reason: str) -> FineTuneStatus:
    return status.with_history(_updated(view.status, run=attempts.settled(view)), result, reason, view.now)


def _suspended(view: View, base: FineTuneStatus) -> Plan:
    if view.holding or view.current is not None:
        message = "the pod saves a checkpoint and frees its GPU"
        return Plan(_updated(base, phase="Suspended", reason="Suspending", message=message), again=5.0)
    message = "spec.suspend is true; set it to false to go on from the last checkpoint"
    return Plan(_updated(base, phase="Suspended", reason="Suspended", message=message))


def _unfinished(before: FineTuneStatus) -> bool:
    return before.run is not None and before.run.finished_at is None


def _may_go_on(view: View) -> bool:
    """A limit that the run failed by was raised since."""
    reason = view.status.reason
    if reason in ("DeadlineExceeded", "BudgetExceeded"):
        return limits.exceeded(view) is None
    return retry.budget_left(view, reason)


def _has_result(view: View) -> bool:
    return view.current is not None and view.current.state == "Succeeded"


def _stuck(view: View) -> tuple[Object, ...]:
    """The current Job, when it counts as failed although its pod still waits."""
    current = view.current
    if current is None or not current.given_up:
        return ()
    return tuple(job for job in view.jobs if job["metadata"]["uid"] == current.uid)


def _active(view: View) -> tuple[Object, ...]:
    """Jobs whose pods may still run; those that ended are kept for their logs."""
    return tuple(job for job in view.jobs if not observe.ended(job))


def _ttl(view: View) -> float:
    return float(seconds(view.parent.spec.ttl_after_finished or DEFAULT_TTL))


def _updated(base: FineTuneStatus, **changes: Any) -> FineTuneStatus:
    return base.model_copy(update=changes)
