"""What the status says: verdicts that are asked in order, the first that has an answer wins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from finetune_operator import times
from finetune_operator.api.adapterdeploymentstatus import (
    AdapterDeploymentPhase,
    AdapterDeploymentStatus,
    AdapterDeploymentSummary,
    CanaryStatus,
    ProbeStatus,
    ServedAdapter,
    ServedHistoryEntry,
)
from finetune_operator.api.common import Condition
from finetune_operator.api.finetunestatus import BaseModelStatus
from finetune_operator.serving import canary, containers, observe, workloads
from finetune_operator.serving.targets import Target
from finetune_operator.serving.view import View
from finetune_serving.desired import AdapterReport

HISTORY_KEPT = 10

# phase, reason, message
Verdict = tuple[AdapterDeploymentPhase, str, str]

#: An adapter in this state cannot be cured by waiting.
_WAITING_REFUSALS = frozenset({"NoAdapterYet"})


def complete(view: View) -> AdapterDeploymentStatus:
    """The whole next status."""
    adapters = [served_adapter(view, target) for target in view.targets]
    phase, reason, message = verdict(view, adapters)
    ready = ready_replicas(view)
    deployed = view.deployment.get("status", {}) if view.deployment else {}
    first = next((adapter.served_digest for adapter in adapters), "")
    known = AdapterDeploymentStatus(
        observed_generation=view.parent.metadata.generation,
        phase=phase,
        reason=reason,
        message=message,
        summary=AdapterDeploymentSummary(
            adapters=str(len(adapters)),
            ready=f"{ready}/{view.parent.spec.replicas}",
            adapter=first.removeprefix("sha256:")[:12] or "-",
        ),
        replicas=deployed.get("replicas", 0),
        ready_replicas=ready,
        selector=",".join(f"{key}={value}" for key, value in sorted(workloads.selector(view.parent).items())),
        url=f"http://{view.parent.metadata.name}.{view.parent.metadata.namespace}.svc",
        base_model=_base_model(view, adapters),
        adapters=adapters,
        history=history(view, adapters),
    )
    return known.model_copy(update={"conditions": conditions(view, known)})


# ---- adapters --------------------------------------------------------------------------------------------------------


def served_adapter(view: View, target: Target) -> ServedAdapter:
    """One name: what should answer, and what does on every ready pod."""
    before = next((a for a in view.parent.status.adapters if a.name == target.name), ServedAdapter(name=target.name))
    merged = view.parent.spec.mode == "Merge"
    served = _served_merged(view, target, before) if merged else _served_mounted(view, target, before)
    pods = _pods_with(view, target) if not view.silent or merged else before.ready_pods
    delta = _delta(view, target, before)
    tried = None if merged else canary.follow(view, target, served)
    return ServedAdapter(
        name=target.name,
        desired_digest=target.digest,
        desired_uri=target.uri,
        run_id=target.run_id,
        served_digest=served,
        ready_pods=pods,
        probe=ProbeStatus(logprob_delta=delta) if delta is not None else None,
        canary=tried,
        message=_message(view, target, tried),
    )


def _served_mounted(view: View, target: Target, before: ServedAdapter) -> str:
    """The digest that answers on every pod that reports; while pods differ, or say nothing yet, the last one."""
    answering = {observe.main_digest(report, target.name) for report in view.agents.values() if report.ready}
    if len(answering) != 1 or view.silent:
        return before.served_digest
    short = answering.pop()
    known = [target.digest, before.served_digest, *(entry.digest for entry in view.parent.status.history)]
    return next((d for d in known if short and d.removeprefix("sha256:").startswith(short)), before.served_digest)


def _served_merged(view: View, target: Target, before: ServedAdapter) -> str:
    digests = {pod["metadata"].get("annotations", {}).get(workloads.DIGEST, "") for pod in _ready_pods(view)}
    return digests.pop() if len(digests) == 1 else before.served_digest


def _pods_with(view: View, target: Target) -> int:
    """Pods on which the wanted digest is verified and loaded (Mount), or ready pods of its template (Merge)."""
    if view.parent.spec.mode == "Merge":
        marked = [p["metadata"].get("annotations", {}).get(workloads.DIGEST) for p in _ready_pods(view)]
        return marked.count(target.digest)
    reports = _reports_on(view, target)
    return sum(1 for report in reports if report.state == "Ready")


def _reports_on(view: View, target: Target) -> list[AdapterReport]:
    found = (observe.adapter_in(report, target.name, target.digest) for report in view.agents.values())
    return [report for report in found if report is not None]


def _delta(view: View, target: Target, before: ServedAdapter) -> float | None:
    """The smallest effect that was measured on any pod."""
    if view.parent.spec.mode == "Merge":
        merged = observe.merged(view.pods)
        found = [merged.logprob_delta] if merged and merged.logprob_delta is not None else []
    else:
        found = [r.logprob_delta for r in _reports_on(view, target) if r.logprob_delta is not None]
    if found:
        return float(f"{min(found):.4g}")
    return before.probe.logprob_delta if before.probe and before.desired_digest == target.digest else None


def _message(view: View, target: Target, tried: CanaryStatus | None) -> str:
    if target.refusal is not None:
        return target.refusal[1]
    if tried is not None and tried.state == "Failed":
        return f"{tried.reason}: {tried.message}"[:4096]
    failed = _failed_report(view, target)
    return f"{failed.reason}: {failed.message}"[:4096] if failed else ""


def _failed_report(view: View, target: Target) -> AdapterReport | None:
    reports = _reports_on(view, target)
    return next((r for r in reports if r.state == "Failed" and not r.trial_failed), None)


def _ready_pods(view: View) -> list[dict[str, Any]]:
    return [pod for pod in view.pods if observe.ready(pod)]


def ready_replicas(view: View) -> int:
    return int(view.deployment.get("status", {}).get("readyReplicas", 0)) if view.deployment else 0


# ---- the phase -------------------------------------------------------------------------------------------------------


def verdict(view: View, adapters: list[ServedAdapter]) -> Verdict:
    return next(answer for rule in RULES if (answer := rule(view, adapters)) is not None)


def name_taken(view: View, _: list[ServedAdapter]) -> Verdict | None:
    if not view.taken:
        return None
    text = f"{', '.join(view.taken)} exists and is not ours: delete it, or give this object another name"
    return "Failed", "NameTaken", text


def refused_arguments(view: View, _: list[ServedAdapter]) -> Verdict | None:
    names = containers.forbidden_arguments(view.parent)
    if not names:
        return None
    text = f"spec.engine.extraArgs: {', '.join(names)} is set by the operator: remove it"
    if "--api-key" in names:
        text += " (set VLLM_API_KEY in spec.podTemplate.env from a Secret instead)"
    return "Failed", "InvalidEngineArguments", text


def nothing_to_serve(view: View, _: list[ServedAdapter]) -> Verdict | None:
    """No name has an adapter, neither a new one nor one that was served before."""
    if any(target.served for target in view.targets):
        return None
    reason, message = next((t.refusal for t in view.targets if t.refusal is not None), ("NoAdapterYet", ""))
    return ("Pending" if reason in _WAITING_REFUSALS else "Blocked"), reason, message


def no_base_model(view: View, _: list[ServedAdapter]) -> Verdict | None:
    if view.base is not None:
        return None
    return "Blocked", "NoBaseModel", "spec.baseModel is needed where adapters are given by artifact: set s3.uri"


def scaled_to_zero(view: View, _: list[ServedAdapter]) -> Verdict | None:
    if view.parent.spec.replicas or view.pods:
        return None
    return "Ready", "ScaledToZero", "spec.replicas is 0: nothing is served"


def canary_failed(_: View, adapters: list[ServedAdapter]) -> Verdict | None:
    """A trial that ended badly is over: what was in service answers alone until somebody changes something."""
    for adapter in adapters:
        if adapter.canary is None or adapter.canary.state != "Failed":
            continue
        text = (
            f"{adapter.name}: {_short(adapter.desired_digest)} failed as a canary, {adapter.canary.reason}: "
            f"{adapter.canary.message}; {_short(adapter.served_digest)} answers all requests. A newer adapter is tried "
            "by itself; to try this one again, change canary.weight"
        )
        return "Degraded", "CanaryFailed", text
    return None


def adapter_failed(view: View, adapters: list[ServedAdapter]) -> Verdict | None:
    """An adapter that cannot be had, loaded or proved: an old one may still answer for its name."""
    for target, adapter in zip(view.targets, adapters, strict=True):
        failed = _failed_report(view, target)
        if failed is not None and failed.reason != "RankTooLarge":  # for that the pods are replaced
            old = adapter.served_digest not in ("", target.digest)
            text = f"{failed.message}; {adapter.served_digest} goes on answering" if old else failed.message
            return ("Degraded" if adapter.served_digest else "Failed"), failed.reason, text
    merged = observe.merged(view.pods) if view.parent.spec.mode == "Merge" else None
    if merged is not None and merged.reason:
        served = adapters[0].served_digest and ready_replicas(view)
        return ("Degraded" if served else "Failed"), merged.reason, merged.message
    return None


def pod_problem(view: View, _: list[ServedAdapter]) -> Verdict | None:
    problem = observe.problem(view.deployment, view.pods, view.explanations)
    if problem is None:
        return None
    if ready_replicas(view):
        return "Degraded", problem.reason, problem.message
    return ("Failed" if problem.lasting else "Progressing"), problem.reason, problem.message


def adapter_missing(view: View, _: list[ServedAdapter]) -> Verdict | None:
    """Some names are served, others have no adapter."""
    missing = [target for target in view.targets if target.refusal is not None and not target.served]
    if not missing or not ready_replicas(view):
        return None
    assert missing[0].refusal is not None
    return "Degraded", missing[0].refusal[0], missing[0].refusal[1]


def all_served(view: View, adapters: list[ServedAdapter]) -> Verdict | None:
    wanted, ready = view.parent.spec.replicas, ready_replicas(view)
    current = all(adapter.desired_digest and adapter.served_digest == adapter.desired_digest for adapter in adapters)
    if not current or ready < wanted or not _rolled_out(view):
        return None
    lost = [target for target in view.targets if target.refusal is not None]
    if lost:
        assert lost[0].refusal is not None
        return "Ready", lost[0].refusal[0], f"{lost[0].refusal[1]}; its last good adapter goes on answering"
    names = ", ".join(f"{a.name} is {_short(a.served_digest)}" for a in adapters)
    return "Ready", "Serving", names


def underway(view: View, adapters: list[ServedAdapter]) -> Verdict | None:
    waiting = [f"{pod}: {report.message}" for pod, report in sorted(view.agents.items()) if report.message]
    behind = [a for a in adapters if a.desired_digest and a.served_digest != a.desired_digest]
    ready = ready_replicas(view)
    if waiting:
        return "Progressing", "Loading", "; ".join(waiting)[:4096]
    if behind and ready:
        tried = [text for a in behind if (text := _on_trial(view, a))]
        if tried:
            return "Progressing", "Canary", "; ".join(tried)
        text = ", ".join(f"{a.name} to {_short(a.desired_digest)}" for a in behind)
        return "Progressing", "Swapping", f"the pods move {text}"
    return "Progressing", "Starting", f"{ready} of {view.parent.spec.replicas} pods are ready"


def _on_trial(view: View, adapter: ServedAdapter) -> str:
    """What a canary that runs gets, and until when; empty for any other adapter."""
    spec = canary.asked(view.parent, adapter.name)
    if spec is None or adapter.canary is None or adapter.canary.state != "Running":
        return ""
    until = times.rfc3339(canary.ends(adapter.canary, spec))
    return f"{adapter.name}: {_short(adapter.desired_digest)} gets {spec.weight} % of the requests until {until}"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


RULES: tuple[Callable[[View, list[ServedAdapter]], Verdict | None], ...] = (
    name_taken,  # a child's name belongs to somebody else: nothing is touched
    refused_arguments,  # the spec asks vLLM for what the operator decides
    nothing_to_serve,  # waiting for the first adapter, or blocked by a gate
    no_base_model,
    scaled_to_zero,
    adapter_failed,  # what cannot be proved is not served
    pod_problem,  # image, scheduling, crashes
    canary_failed,  # it is not tried again
    adapter_missing,
    all_served,
    underway,
)


def _rolled_out(view: View) -> bool:
    """The Deployment controller has seen the newest template and no pod of an older one is left."""
    if view.deployment is None:
        return False
    status = view.deployment.get("status", {})
    return bool(
        status.get("observedGeneration", 0) >= view.deployment["metadata"].get("generation", 0)
        and status.get("updatedReplicas", 0) >= view.parent.spec.replicas
        and status.get("replicas", 0) <= status.get("updatedReplicas", 0)
    )


# ---- conditions ------------------------------------------------------------------------------------------------------

Holds = tuple[Literal["True", "False", "Unknown"], str, str]


def _gate_passed(view: View, status: AdapterDeploymentStatus) -> Holds:
    refused = [target for target in view.targets if target.refusal is not None]
    if refused:
        assert refused[0].refusal is not None
        reason, message = refused[0].refusal
        return ("False" if reason == "GateNotPassed" else "Unknown"), reason, message
    if view.parent.spec.gate == "Ignore":
        return "Unknown", "GateIgnored", "spec.gate is Ignore: adapters are served whatever their gates say"
    return "True", "GatePassed", "every adapter passed its gates, or was given by its digest"


def _adapters_verified(view: View, status: AdapterDeploymentStatus) -> Holds:
    unserved = (a for a in status.adapters if not a.desired_digest or a.served_digest != a.desired_digest)
    failed = next((a for a in unserved if a.message), None)
    if failed is not None:
        return "False", status.reason, failed.message
    behind = [a.name for a in status.adapters if not a.desired_digest or a.served_digest != a.desired_digest]
    if behind:
        return "False", "Pending", f"not verified on every pod yet: {', '.join(behind)}"
    return "True", "Verified", "digests match, and the answers differ from the base model's"


def _progressing(_: View, status: AdapterDeploymentStatus) -> Holds:
    return ("True" if status.phase == "Progressing" else "False"), status.reason, status.message


def _ready(_: View, status: AdapterDeploymentStatus) -> Holds:
    return ("True" if status.phase == "Ready" else "False"), status.reason, status.message


CONDITIONS: dict[str, Callable[[View, AdapterDeploymentStatus], Holds]] = {
    "GatePassed": _gate_passed,  # what is to be served may be served
    "AdaptersVerified": _adapters_verified,  # every wanted digest is loaded and proved on every ready pod
    "Progressing": _progressing,  # something is on its way and needs nobody
    "Ready": _ready,  # every name is answered by its wanted digest, on all replicas
}


def conditions(view: View, status: AdapterDeploymentStatus) -> list[Condition]:
    """All conditions; the time of each moves only when its status does."""
    before = {condition.type: condition for condition in view.parent.status.conditions}
    found = []
    for kind, decide in CONDITIONS.items():
        holds, reason, message = decide(view, status)
        old = before.get(kind)
        since = old.last_transition_time if old is not None and old.status == holds else None
        found.append(
            Condition(
                type=kind,
                status=holds,
                reason=reason,
                message=message,
                last_transition_time=since or times.rfc3339(view.now),
                observed_generation=view.parent.metadata.generation,
            )
        )
    return found


# ---- the rest --------------------------------------------------------------------------------------------------------


def history(view: View, adapters: list[ServedAdapter]) -> list[ServedHistoryEntry]:
    """What came into service, newest first; the address stays known, so that it can go on being served."""
    entries = list(view.parent.status.history)
    for target, adapter in zip(view.targets, adapters, strict=True):
        last = next((entry for entry in entries if entry.name == adapter.name), None)
        if adapter.served_digest != target.digest or not adapter.served_digest:
            continue
        if last is None or last.digest != adapter.served_digest:
            seen = any(e.name == adapter.name and e.digest == adapter.served_digest for e in entries)
            reason = "First" if last is None else "Rollback" if seen else "NewAdapter"
            entry = ServedHistoryEntry(
                name=adapter.name,
                digest=adapter.served_digest,
                uri=target.uri,
                reason=reason,
                served_at=times.rfc3339(view.now),
            )
            entries.insert(0, entry)
    return _newest(entries)


def _newest(entries: list[ServedHistoryEntry]) -> list[ServedHistoryEntry]:
    """The newest ones, and of every name the last: its address is needed while it is in service."""
    last = {entry.name: index for index, entry in reversed(list(enumerate(entries)))}
    kept = sorted(last.values())[:HISTORY_KEPT]
    others = [index for index in range(len(entries)) if index not in kept][: HISTORY_KEPT - len(kept)]
    return [entries[index] for index in sorted([*kept, *others])]


def _base_model(view: View, adapters: list[ServedAdapter]) -> BaseModelStatus | None:
    """The base model of what is in service: it moves when the last name has moved."""
    before = view.parent.status.base_model
    moving = any(a.served_digest and a.served_digest != a.desired_digest for a in adapters)
    if view.base is None or (moving and before is not None):
        return before
    base = view.base
    return BaseModelStatus(revision=base.revision, digest=base.digest, uri=base.uri, parameters=base.parameters)


def to_json(status: AdapterDeploymentStatus) -> dict[str, Any]:
    """As written to the API server: without what is not known. Counts stay: the scale subresource reads them."""
    document = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {key: _compact(value) for key, value in document.items() if value not in ("", [], {})}


def _compact(value: Any) -> Any:
    if isinstance(value, dict):
        compacted = {key: _compact(item) for key, item in value.items()}
        return {key: item for key, item in compacted.items() if item not in ("", [], {})}
    return [_compact(item) for item in value] if isinstance(value, list) else value
