"""The desired set of adapters, and how one digest takes over from another: pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from finetune_operator import times
from finetune_operator.api.adapterdeployment import Adapter, AdapterDeployment
from finetune_operator.api.adapterdeploymentstatus import ServedAdapter
from finetune_operator.api.common import seconds
from finetune_operator.serving.targets import Base, Target
from finetune_serving.desired import Desired, DesiredAdapter, DesiredBase, Probe


def desired(
    parent: AdapterDeployment, targets: Sequence[Target], base: Base, before: Desired | None, now: dt.datetime
) -> Desired:
    """The set that the agents should serve; its sequence is new exactly when something in it is."""
    entries = [entry for target in targets if target.served for entry in _entries(parent, target, base, now)]
    fresh = Desired(
        sequence=0,
        base_model=DesiredBase(uri=base.uri, digest=base.digest),
        adapters=entries,
        probe=Probe(prompts=list(parent.spec.probe.prompts), min_logprob_delta=parent.spec.probe.min_logprob_delta),
    )
    if before is not None and before.model_copy(update={"sequence": 0}) == fresh:
        return before
    # Higher than any that went out before, even if the ConfigMap was deleted and made anew.
    newest = before.sequence if before is not None else 0
    return fresh.model_copy(update={"sequence": max(newest + 1, int(now.timestamp()))})


def canary_ends(parent: AdapterDeployment, name: str) -> dt.datetime | None:
    """When the new adapter of a name takes all requests; None while there is no canary that runs."""
    adapter, known = _spec_of(parent, name), status_of(parent, name)
    if adapter is None or adapter.canary is None or known is None or known.canary_since is None:
        return None
    return times.parse(known.canary_since) + dt.timedelta(seconds=seconds(adapter.canary.after))


def status_of(parent: AdapterDeployment, name: str) -> ServedAdapter | None:
    return next((adapter for adapter in parent.status.adapters if adapter.name == name), None)


def _entries(parent: AdapterDeployment, target: Target, base: Base, now: dt.datetime) -> list[DesiredAdapter]:
    """The wanted digest, and the one in service until that is replaced: a pod that restarts meanwhile needs it too."""
    wanted = DesiredAdapter(name=target.name, digest=target.digest, uri=target.uri)
    served = _in_service(parent, target, base)
    if served is None:
        return [wanted]
    adapter, ends = _spec_of(parent, target.name), canary_ends(parent, target.name)
    if adapter is None or adapter.canary is None or (ends is not None and now >= ends):
        return [wanted, served.model_copy(update={"weight": 0})]
    share = adapter.canary.weight
    return [
        wanted.model_copy(update={"weight": share}),
        served.model_copy(update={"weight": 100 - share}),
    ]


def _in_service(parent: AdapterDeployment, target: Target, base: Base) -> DesiredAdapter | None:
    known, before = status_of(parent, target.name), parent.status.base_model
    if known is None or known.served_digest in ("", target.digest):
        return None
    if before is not None and (before.uri, before.digest) != (base.uri, base.digest):
        return None  # on another base model, in other pods, which go on with the set that they have
    uri = next((entry.uri for entry in parent.status.history if entry.digest == known.served_digest), "")
    return DesiredAdapter(name=target.name, digest=known.served_digest, uri=uri) if uri else None


def _spec_of(parent: AdapterDeployment, name: str) -> Adapter | None:
    return next((adapter for adapter in parent.spec.adapters if adapter.name == name), None)
