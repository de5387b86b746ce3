"""One look at a FineTune: get it and its children, plan, act."""

from __future__ import annotations

import logging
from dataclasses import replace

from pydantic import ValidationError

from finetune_operator import labels, logs, metrics
from finetune_operator.api.finetune import FineTune
from finetune_operator.context import Context
from finetune_operator.event import Event
from finetune_operator.finetune import explain, finalizer, twins
from finetune_operator.finetune.jobs import rendezvous
from finetune_operator.finetune.plan import SAME_RUN, Plan, plan
from finetune_operator.finetune.status import to_json
from finetune_operator.finetune.view import View, view
from finetune_operator.kube import FINETUNES, JOBS, PODS, SERVICES, ApiError, Object
from finetune_operator.queue import Key

log = logging.getLogger(__name__)

# A Job of the same name from an earlier life is being deleted.
NAME_TAKEN_SECONDS = 1.0


async def reconcile(context: Context, key: Key) -> float | None:
    """Bring one FineTune a step further; answers in how many seconds to look again."""
    newborn = context.newborn.pop(key, None)
    raw = newborn or await context.kube.get(FINETUNES, key.namespace, key.name)
    if raw is None or raw["metadata"].get("deletionTimestamp"):
        context.reports.forget(key)
        metrics.phases.set(*key, None)
        return await finalizer.reconcile(context, key, raw) if raw is not None else None
    try:
        parent = FineTune.model_validate(raw)
    except ValidationError as error:
        await _say_invalid(context, raw, error)
        return None
    raw = await finalizer.keep(context, raw, parent.spec.deletion_policy)
    # A newborn has no children; should a watch have shown us an old one, creating its Job again does nothing.
    jobs, pods = ([], []) if newborn else await _children(context, key)
    context.reports.keep_only(key, {pod["metadata"]["name"] for pod in pods})
    explanations = await explain.waiting(context.kube, jobs, pods, context.now())
    seen = view(parent, jobs, pods, context.reports.of(key), explanations, context.settings, context.now())
    if parent.status.run is not None:
        logs.about_run(parent.status.run.id or parent.status.run.inputs)
    decided = await _unless_trained_elsewhere(context, key, seen, plan(seen))
    again = await _act(context, raw, decided, changed=decided.status != parent.status)
    metrics.phases.set(*key, decided.status.phase)
    return min((s for s in (again, explain.again(jobs, pods, context.now())) if s is not None), default=None)


async def _unless_trained_elsewhere(context: Context, key: Key, seen: View, decided: Plan) -> Plan:
    """Before a train Job is created, or while another FineTune's is waited for: the plan that minds the other one."""
    if decided.create is None:
        return decided
    stage, run = decided.create["metadata"]["labels"][labels.STAGE], decided.status.run
    if stage != "train" and seen.status.reason != SAME_RUN:
        return decided
    run_id = run.id if run is not None and run.id else seen.run.id
    twin = await twins.claim(context, key, run_id, seen.parent.spec.output.s3.uri)
    return plan(replace(seen, twin=str(twin))) if twin else decided


async def _children(context: Context, key: Key) -> tuple[list[Object], list[Object]]:
    selector = labels.of_owner(key.kind, key.name)
    # One after the other: a Job that has failed must never be seen beside its pod as it was before that.
    jobs = await context.kube.list(JOBS, key.namespace, selector)
    return jobs, await context.kube.list(PODS, key.namespace, selector)


async def _act(context: Context, raw: Object, decided: Plan, *, changed: bool) -> float | None:
    """Delete, create, write the status, tell. Every step can be repeated, so an error in one means: plan again."""
    for job in decided.delete:
        meta = job["metadata"]
        if await context.kube.delete(JOBS, meta["namespace"], meta["name"], uid=meta["uid"]):
            log.info("deleted Job %s", meta["name"])
    if decided.create is not None and not await _create(context, raw, decided.create):
        log.info("waits: the name %s is taken by a Job that is being deleted", decided.create["metadata"]["name"])
        return NAME_TAKEN_SECONDS
    if changed:
        context.wrote(await context.kube.replace_status(FINETUNES, raw, to_json(decided.status)))
    if decided.failure:
        metrics.attempts_failed.labels(decided.failure).inc()
    for event in decided.events:
        log.log(logging.WARNING if event.type == "Warning" else logging.INFO, "%s: %s", event.reason, event.note)
        await context.events.record(raw, event)
    if decided.create is not None:
        # Should no pod appear, no event will tell.
        return explain.PATIENCE_SECONDS
    return decided.again


async def _create(context: Context, raw: Object, job: Object) -> bool:
    """False while the name of the Job, or of its Service, is taken by one that is on its way out."""
    stored = await _create_job(context, raw, job)
    return stored is not None and await _create_rendezvous(context, raw, stored)


async def _create_job(context: Context, raw: Object, job: Object) -> Object | None:
    """The Job as stored; None while its name is taken by one that is on its way out."""
    meta = job["metadata"]
    try:
        stored = await context.kube.create(JOBS, job)
        context.wrote(stored)
    except ApiError as error:
        if error.already_exists:
            found = await context.kube.get(JOBS, meta["namespace"], meta["name"])
            if found is None or found["metadata"].get("deletionTimestamp"):
                return None
            owners = found["metadata"].get("ownerReferences") or []
            if any(owner["uid"] == raw["metadata"]["uid"] for owner in owners):
                return found  # created by an attempt at this very plan whose status write did not succeed
            if any(owner["kind"] == raw["kind"] and owner["name"] == raw["metadata"]["name"] for owner in owners):
                return None  # of a deleted object of the same name; the garbage collector is at it
            await _say_refused(context, raw, f"Job {meta['name']} exists and is not ours: rename or delete it")
        elif error.refused and not error.namespace_ending:
            await _say_refused(context, raw, f"Job {meta['name']} was refused: {error.message}")
        raise
    metrics.jobs_created.labels(meta["labels"][labels.STAGE]).inc()
    log.info("created Job %s", meta["name"])
    return stored


async def _create_rendezvous(context: Context, raw: Object, job: Object) -> bool:
    """The Service of a Job with several pods; False while one of an earlier Job of this name is on its way out."""
    service = rendezvous(job)
    if service is None:
        return True
    meta = service["metadata"]
    try:
        await context.kube.create(SERVICES, service)
    except ApiError as error:
        if error.already_exists:
            found = await context.kube.get(SERVICES, meta["namespace"], meta["name"])
            owners = (found or {}).get("metadata", {}).get("ownerReferences") or []
            return any(owner["uid"] == job["metadata"]["uid"] for owner in owners)
        if error.refused and not error.namespace_ending:
            await _say_refused(context, raw, f"Service {meta['name']} was refused: {error.message}")
        raise
    return True


async def _say_refused(context: Context, raw: Object, message: str) -> None:
    """Show why no Job could be created; everything else in the status stays, so that the plan is made again."""
    status = {"phase": "Pending", **(raw.get("status") or {}), "reason": "JobRefused", "message": message}
    if status != raw.get("status"):
        await context.kube.replace_status(FINETUNES, raw, status)
        await context.events.record(raw, Event("JobRefused", message, "Warning"))


async def _say_invalid(context: Context, raw: Object, error: ValidationError) -> None:
    """An object that the API server took and we cannot read: of another version of the CRD."""
    mistakes = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:5])
    message = f"this version of the operator cannot read the object: {mistakes}"
    generation = raw["metadata"].get("generation", 0)
    status = {
        **(raw.get("status") or {}),
        "observedGeneration": generation,
        "phase": "Failed",
        "reason": "InvalidSpec",
        "message": message,
    }
    if status != raw.get("status"):
        await context.kube.replace_status(FINETUNES, raw, status)
        await context.events.record(raw, Event("InvalidSpec", message, "Warning"))
