"""The desired set of adapters, and how one digest takes over from another: pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.serving import canary
from finetune_operator.serving.targets import Base, Target, in_service
from finetune_serving.desired import Desired, DesiredAdapter, DesiredBase, Probe


def desired(
    parent: AdapterDeployment, targets: Sequence[Target], base: Base, before: Desired | None, now: dt.datetime
) -> Desired:
    """The set that the agents should serve; its sequence is new exactly when something in it is."""
    entries = [entry for target in targets if target.served for entry in _entries(parent, target, base)]
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


def _entries(parent: AdapterDeployment, target: Target, base: Base) -> list[DesiredAdapter]:
    """The wanted digest, and the one in service until that is replaced: a pod that restarts meanwhile needs it too."""
    wanted = DesiredAdapter(name=target.name, digest=target.digest, uri=target.uri)
    replaced = in_service(parent, target, base)
    if replaced is None:
        return [wanted]
    served = DesiredAdapter(name=target.name, digest=replaced[0], uri=replaced[1])
    spec, tried = canary.asked(parent, target.name), canary.known(parent, target)
    if spec is None or tried is None or tried.state == "Promoted":
        return [wanted, served.model_copy(update={"weight": 0})]
    if tried.state == "Failed":
        return [served]
    return [
        # First: a pod that starts loads it first, and serves.
        served.model_copy(update={"weight": 100 - spec.weight}),
        wanted.model_copy(update={"weight": spec.weight, "trial": tried.trial}),
    ]
