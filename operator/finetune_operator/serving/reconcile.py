"""One look at an AdapterDeployment: get it, its FineTunes and its children, plan, act."""

from __future__ import annotations

import asyncio
import logging

from pydantic import ValidationError

from finetune_operator import labels, metrics
from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.api.finetune import FineTune
from finetune_operator.context import Context
from finetune_operator.event import Event
from finetune_operator.finetune import explain
from finetune_operator.kube import (
    ADAPTERDEPLOYMENTS,
    CONFIGMAPS,
    DEPLOYMENTS,
    FINETUNES,
    PODS,
    SERVICES,
    ApiError,
    Object,
)
from finetune_operator.queue import Key
from finetune_operator.serving.plan import Plan, plan
from finetune_operator.serving.status import to_json
from finetune_operator.serving.view import view
from finetune_operator.serving.workloads import config_map_name

log = logging.getLogger(__name__)

#: Agents report every few seconds; when they stop to, somebody has to look.
SILENCE_SECONDS = 60.0


async def reconcile(context: Context, key: Key) -> float | None:
    """Bring one AdapterDeployment a step further; answers in how many seconds to look again."""
    raw = await context.kube.get(ADAPTERDEPLOYMENTS, key.namespace, key.name)
    if raw is None or raw["metadata"].get("deletionTimestamp"):
        # Its children are deleted by the garbage collector: they carry an owner reference.
        context.reports.forget(key)
        metrics.phases.set(*key, None)
        return None
    try:
        parent = AdapterDeployment.model_validate(raw)
    except ValidationError as error:
        await _say_invalid(context, raw, error)
        return None
    kube, namespace = context.kube, key.namespace
    deployment, config_map, service, pods, finetunes = await asyncio.gather(
        kube.get(DEPLOYMENTS, namespace, key.name),
        kube.get(CONFIGMAPS, namespace, config_map_name(parent)),
        kube.get(SERVICES, namespace, key.name),
        kube.list(PODS, namespace, labels.of_owner(key.kind, key.name)),
        _finetunes(context, parent),
    )
    context.reports.keep_only(key, {pod["metadata"]["name"] for pod in pods})
    explanations = await explain.waiting(kube, (), pods, context.now())
    seen = view(
        parent,
        finetunes,
        deployment,
        config_map,
        service,
        pods,
        context.reports.of(key),
        explanations,
        context.settings,
        context.now(),
    )
    decided = plan(seen)
    await _act(context, raw, key, decided)
    metrics.phases.set(*key, decided.status.phase)
    wishes = (decided.again, SILENCE_SECONDS if seen.pods else None, explain.again((), pods, context.now()))
    return min((seconds for seconds in wishes if seconds is not None), default=None)


async def _finetunes(context: Context, parent: AdapterDeployment) -> dict[str, FineTune]:
    """The FineTunes that are followed; one that this version cannot read counts as absent."""
    names = {adapter.fine_tune_ref.name for adapter in parent.spec.adapters if adapter.fine_tune_ref is not None}
    found = {}
    for name in sorted(names):
        raw = await context.kube.get(FINETUNES, parent.metadata.namespace, name)
        if raw is None:
            continue
        try:
            found[name] = FineTune.model_validate(raw)
        except ValidationError as error:
            log.warning("FineTune %s cannot be read: %s", name, error)
    return found


async def _act(context: Context, raw: Object, key: Key, decided: Plan) -> None:
    """Apply, delete, write the status, tell. Every step can be repeated, so an error in one means: plan again."""
    for resource, manifest in decided.apply:
        try:
            await context.kube.apply(resource, manifest)
        except ApiError as error:
            if error.refused:
                message = f"{resource.kind} {manifest['metadata']['name']} was refused: {error.message}"
                await _say_refused(context, raw, f"{resource.kind}Refused", message)
            raise
        log.info("applied %s %s", resource.kind, manifest["metadata"]["name"])
    if decided.desired is not None:
        # After the ConfigMap: what agents are told at once is also what they find when they restart.
        context.reports.set_desired(key, decided.desired.model_dump(mode="json", by_alias=True))
    for resource, child in decided.delete:
        meta = child["metadata"]
        if await context.kube.delete(resource, meta["namespace"], meta["name"], uid=meta["uid"]):
            log.info("deleted %s %s", resource.kind, meta["name"])
    status = to_json(decided.status)
    if status != raw.get("status"):
        await context.kube.replace_status(ADAPTERDEPLOYMENTS, raw, status)
    for event in decided.events:
        log.log(logging.WARNING if event.type == "Warning" else logging.INFO, "%s: %s", event.reason, event.note)
        await context.events.record(raw, event)


async def _say_refused(context: Context, raw: Object, reason: str, message: str) -> None:
    """Show what the API server would not take; everything else in the status stays."""
    status = {**(raw.get("status") or {}), "phase": "Failed", "reason": reason, "message": message}
    if status != raw.get("status"):
        await context.kube.replace_status(ADAPTERDEPLOYMENTS, raw, status)
        await context.events.record(raw, Event(reason, message, "Warning"))


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
        await context.kube.replace_status(ADAPTERDEPLOYMENTS, raw, status)
        await context.events.record(raw, Event("InvalidSpec", message, "Warning"))
