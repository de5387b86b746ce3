"""How a new adapter does beside the one in service: waiting, running, promoted or failed. Pure."""

from __future__ import annotations

import datetime as dt
import hashlib
import json

from finetune_operator import times
from finetune_operator.api.adapterdeployment import AdapterDeployment, Canary
from finetune_operator.api.adapterdeploymentstatus import CanaryStatus
from finetune_operator.api.common import seconds
from finetune_operator.serving import observe
from finetune_operator.serving.targets import Target, in_service
from finetune_operator.serving.view import View


def asked(parent: AdapterDeployment, name: str) -> Canary | None:
    """The canary of a name's spec."""
    return next((adapter.canary for adapter in parent.spec.adapters if adapter.name == name), None)


def trial_of(parent: AdapterDeployment, target: Target) -> str:
    """Names what is tried. A failure counts for this name alone: a newer digest or such an edit is another try."""
    spec, canary = parent.spec, asked(parent, target.name)
    tried = {
        "digest": target.digest,
        "weight": canary.weight if canary is not None else 0,
        "probe": spec.probe.model_dump(mode="json"),
        "engine": spec.engine.model_dump(mode="json"),
    }
    text = json.dumps([target.name, tried], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def known(parent: AdapterDeployment, target: Target) -> CanaryStatus | None:
    """What the status says of the trial that is asked for now; None when there is no canary in the spec."""
    if asked(parent, target.name) is None:
        return None
    trial = trial_of(parent, target)
    before = next((adapter.canary for adapter in parent.status.adapters if adapter.name == target.name), None)
    return before if before is not None and before.trial == trial else CanaryStatus(trial=trial)


def follow(view: View, target: Target, served: str) -> CanaryStatus | None:
    """One step on: `served` is the digest that answers for the name beside the canary."""
    canary, now = asked(view.parent, target.name), known(view.parent, target)
    if canary is None or now is None or not target.served or served in ("", target.digest):
        return None
    if view.base is None or in_service(view.parent, target, view.base) is None:
        return None
    if now.state == "Failed":
        return now
    if (failure := _failure(view, target, now.trial)) is not None:
        return now.model_copy(update={"state": "Failed", "reason": failure[0], "message": failure[1][:4096]})
    if now.state == "Waiting" and _verified_everywhere(view, target):
        return now.model_copy(update={"state": "Running", "since": times.rfc3339(view.now)})
    over = now.state == "Running" and ends(now, canary) <= view.now
    return now.model_copy(update={"state": "Promoted"}) if over and _verified_everywhere(view, target) else now


def ends(now: CanaryStatus, canary: Canary) -> dt.datetime:
    """When a running canary takes all requests."""
    assert now.since is not None, "a canary that runs has begun"
    return times.parse(now.since) + dt.timedelta(seconds=seconds(canary.after))


def _failure(view: View, target: Target, trial: str) -> tuple[str, str] | None:
    """(reason, message) of the first pod on which this very trial has failed."""
    for pod, report in sorted(view.agents.items()):
        found = observe.adapter_in(report, target.name, target.digest)
        if found is not None and found.trial_failed and found.trial == trial:
            return found.reason, f"{found.message} (pod {pod})"
    return None


def _verified_everywhere(view: View, target: Target) -> bool:
    """Every pod has told so lately: a pod that is silent may have failed requests that nobody has heard of."""
    reports = [view.agents.get(pod["metadata"]["name"]) for pod in view.pods]
    found = [observe.adapter_in(r, target.name, target.digest) if r is not None else None for r in reports]
    return bool(found) and all(report is not None and report.state == "Ready" for report in found)
