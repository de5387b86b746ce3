"""Decides what to do about an AdapterDeployment. Pure: a View goes in, a Plan comes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.adapterdeploymentstatus import AdapterDeploymentStatus
from finetune_operator.api.finetune import FineTune
from finetune_operator.event import Event
from finetune_operator.kube import CONFIGMAPS, DEPLOYMENTS, SERVICES, Resource
from finetune_operator.serving import canary, rollout, status, workloads
from finetune_operator.serving.containers import Limits
from finetune_operator.serving.targets import Target
from finetune_operator.serving.view import View
from finetune_operator.serving.workloads import HASH
from finetune_serving.desired import Desired
from finetune_trainer.runspec import Storage

Object = dict[str, Any]

SMALLEST_RANK = 16


@dataclass(frozen=True)
class Plan:
    """Apply these, delete those, write this status, then post these events; `desired` is what agents are answered."""

    status: AdapterDeploymentStatus
    apply: tuple[tuple[Resource, Object], ...] = ()
    delete: tuple[tuple[Resource, Object], ...] = ()
    desired: Desired | None = None
    events: tuple[Event, ...] = ()
    again: float | None = None


def plan(view: View) -> Plan:
    """Nothing is touched while a name is taken, the spec is wrong, or there is nothing to serve."""
    decided = status.complete(view)
    events = tuple(_events(view, decided))
    if view.base is None or decided.reason in ("NameTaken", "InvalidEngineArguments"):
        return Plan(decided, events=events)
    if not any(target.served for target in view.targets):
        return Plan(decided, events=events)
    if view.parent.spec.mode == "Merge":
        target = next(target for target in view.targets if target.served)
        storage, secret = storage_of(view, target)
        deployment = workloads.merge_deployment(view.parent, view.base, target, storage, secret, view.settings)
        leftover = ((CONFIGMAPS, view.config_map),) if view.config_map else ()
        return Plan(decided, _changed(view, deployment), leftover, events=events)
    desired = rollout.desired(view.parent, view.targets, view.base, view.desired_before, view.now)
    storage, secret = storage_of(view, next(target for target in view.targets if target.served))
    deployment = workloads.mount_deployment(view.parent, view.base, limits(view), storage, secret, view.settings)
    config_map = workloads.config_map(view.parent, desired)
    return Plan(decided, _changed(view, deployment, config_map), (), desired, events, _again(view, decided))


def limits(view: View) -> Limits:
    """The LoRA slots. The rank only grows while the Deployment lives: each change of it replaces the pods."""
    known = [target.rank for target in view.targets]
    reported = [a.rank or 0 for report in view.agents.values() for a in report.adapters]
    # A canary keeps two digests of a name loaded; during a swap one more is, one name after the other.
    canaries = sum(1 for adapter in view.parent.spec.adapters if adapter.canary is not None)
    return Limits(max(SMALLEST_RANK, *known, *reported, _rank_now(view)), len(view.targets) + canaries + 1)


def storage_of(view: View, target: Target) -> tuple[Storage, str]:
    """Where the adapters are, and the Secret for it: the FineTune's own, else the chart's."""
    defaults = view.settings.storage
    finetune: FineTune | None = view.finetunes.get(target.finetune)
    s3 = finetune.spec.output.s3 if finetune is not None else None
    uri = s3.uri if s3 is not None and s3.uri else defaults.uri
    reference = s3.credentials_secret_ref if s3 is not None else None
    secret = reference.name if reference is not None else defaults.credentials_secret
    return Storage(uri=uri, endpoint=defaults.endpoint, region=defaults.region), secret


def _rank_now(view: View) -> int:
    if view.deployment is None:
        return 0
    for container in view.deployment["spec"]["template"]["spec"].get("initContainers") or []:
        for variable in container.get("env") or []:
            if variable["name"] == "FINETUNE_MIN_LORA_RANK":
                return int(variable["value"])
    return 0


def _changed(view: View, deployment: Object, *others: Object) -> tuple[tuple[Resource, Object], ...]:
    """What differs from what was applied last. The ConfigMap goes first: pods mount it."""
    wanted: list[tuple[Resource, Object, Object | None]] = [
        *((CONFIGMAPS, other, view.config_map) for other in others),
        (SERVICES, workloads.service(view.parent), view.service),
        (DEPLOYMENTS, deployment, view.deployment),
    ]
    made = ((resource, workloads.hashed(manifest), now) for resource, manifest, now in wanted)
    return tuple((resource, manifest) for resource, manifest, now in made if _hash(manifest) != _hash(now))


def _hash(manifest: Object | None) -> str:
    annotations = (manifest or {}).get("metadata", {}).get("annotations") or {}
    return str(annotations.get(HASH, ""))


def _again(view: View, decided: AdapterDeploymentStatus) -> float | None:
    """When a canary ends."""
    left = [
        (canary.ends(adapter.canary, spec.canary) - view.now).total_seconds()
        for adapter, spec in zip(decided.adapters, view.parent.spec.adapters, strict=True)
        if adapter.canary is not None and adapter.canary.state == "Running" and spec.canary is not None
    ]
    return min((seconds for seconds in left if seconds > 0), default=None)


def _events(view: View, decided: AdapterDeploymentStatus) -> Iterable[Event]:
    before = view.parent.status
    known = {(entry.name, entry.digest, entry.served_at) for entry in before.history}
    for entry in decided.history:
        if (entry.name, entry.digest, entry.served_at) not in known:
            yield Event("AdapterServed", f"{entry.name} is answered by {entry.digest} ({entry.reason})")
    if (decided.phase, decided.reason) == (before.phase, before.reason):
        return
    if decided.phase in ("Blocked", "Failed", "Degraded"):
        yield Event(decided.reason, decided.message, "Warning")
    elif decided.phase == "Ready":
        yield Event("Ready", decided.message)
