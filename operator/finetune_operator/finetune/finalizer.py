"""Puts the finalizer on a FineTune with `deletionPolicy: Delete`, and acts on its deletion until it may go."""

from __future__ import annotations

import logging

from pydantic import ValidationError

from finetune_operator import labels
from finetune_operator.api.finetune import FineTune
from finetune_operator.context import Context
from finetune_operator.event import Event
from finetune_operator.finetune import deletion
from finetune_operator.finetune.jobs import storage_of
from finetune_operator.finetune.ownership import FINALIZER, Artifacts, artifacts
from finetune_operator.kube import ADAPTERDEPLOYMENTS, FINETUNES, JOBS, PODS, ApiError, Object, Resource
from finetune_operator.queue import Key

log = logging.getLogger(__name__)


async def keep(context: Context, raw: Object, policy: str) -> Object:
    """The object with the finalizer exactly when its policy is Delete."""
    has = FINALIZER in (raw["metadata"].get("finalizers") or [])
    return raw if has == (policy == "Delete") else await _set(context, raw, wanted=not has)


async def reconcile(context: Context, key: Key, raw: Object) -> float | None:
    """One step of the deletion; answers in how many seconds to look again."""
    if FINALIZER not in (raw["metadata"].get("finalizers") or []):
        return None  # its children are deleted by the garbage collector: they carry an owner reference
    try:
        parent = FineTune.model_validate(raw)
    except ValidationError as error:
        note = f"this version of the operator cannot read the object, so its artifacts stay in the bucket: {error}"
        await _tell(context, raw, Event("ArtifactsKept", note, "Warning"))
        await _set(context, raw, wanted=False)
        return None
    storage = storage_of(parent.spec, context.settings).uri
    own = artifacts(parent, storage, await _all(context, FINETUNES), await _all(context, ADAPTERDEPLOYMENTS))
    selector = labels.of_owner(key.kind, key.name)
    jobs = await context.kube.list(JOBS, key.namespace, selector)
    pods = await context.kube.list(PODS, key.namespace, selector)
    return await _act(context, raw, own, deletion.step(parent, own, jobs, pods, context.settings, context.now()))


async def _act(context: Context, raw: Object, own: Artifacts, step: deletion.Step) -> float | None:
    for job in step.delete:
        meta = job["metadata"]
        await context.kube.delete(JOBS, meta["namespace"], meta["name"], uid=meta["uid"])
    if step.create is not None:
        try:
            await context.kube.create(JOBS, step.create)
            log.info("created Job %s: %s", step.create["metadata"]["name"], step.message)
        except ApiError as error:
            if error.namespace_ending:
                # No Job can be created here any more. A finalizer that waits for one would hold the namespace for ever.
                step = deletion.Step(release=True, event=deletion.kept(own, "the namespace is being deleted"))
            elif error.refused:
                note = (
                    f"the clean-up Job was refused: {error.message}. It is tried again for an hour; {deletion.WAY_OUT}"
                )
                await _show(context, raw, "CleanupFailed", note)
                await _tell(context, raw, Event("CleanupFailed", note, "Warning"))
                return deletion.PAUSE_SECONDS
            elif not error.already_exists:
                raise
    if step.event is not None:
        await _tell(context, raw, step.event)
    if step.release:
        await _set(context, raw, wanted=False)
        return None
    await _show(context, raw, step.reason, step.message)
    return step.again


async def _show(context: Context, raw: Object, reason: str, message: str) -> None:
    status = {"phase": "Pending", **(raw.get("status") or {}), "reason": reason, "message": message}
    if status != raw.get("status"):
        context.wrote(await context.kube.replace_status(FINETUNES, raw, status))


async def _tell(context: Context, raw: Object, event: Event) -> None:
    # In the log too: a namespace that is being deleted takes no Events.
    log.log(logging.WARNING if event.type == "Warning" else logging.INFO, "%s: %s", event.reason, event.note)
    await context.events.record(raw, event)


async def _set(context: Context, raw: Object, *, wanted: bool) -> Object:
    meta = raw["metadata"]
    others = [name for name in meta.get("finalizers") or [] if name != FINALIZER]
    # With the version that was read: somebody else's finalizer must not be lost.
    patch = {"finalizers": [*others, FINALIZER] if wanted else others, "resourceVersion": meta["resourceVersion"]}
    log.info("%s finalizer %s", "adds" if wanted else "removes", FINALIZER)
    return await context.kube.patch(FINETUNES, meta["namespace"], meta["name"], {"metadata": patch})


async def _all(context: Context, resource: Resource) -> list[Object]:
    return [item for ns in context.settings.watch_namespaces or ("",) for item in await context.kube.list(resource, ns)]
