"""What Deployment, pods and the agents' reports say: pure reading, no decisions."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_operator import times
from finetune_operator.report import Report
from finetune_serving.desired import AdapterReport, AgentReport
from finetune_trainer.mergespec import MergeResult

Object = dict[str, Any]

#: Older reports are of an agent that hangs, or of a network that is cut: they prove nothing any more.
FRESH_SECONDS = 60.0

_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError")


@dataclass(frozen=True)
class Problem:
    """Why a pod does not get ready; `lasting` when waiting will not cure it."""

    reason: str
    message: str
    lasting: bool


def agents(reports: Mapping[str, Report], pods: Sequence[Object], now: dt.datetime) -> dict[str, AgentReport]:
    """The fresh reports of the pods that exist, by pod name."""
    uids = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in pods}
    found = {}
    for name, report in reports.items():
        if uids.get(name) != report.pod_uid or (now - report.received).total_seconds() > FRESH_SECONDS:
            continue
        try:
            found[name] = AgentReport.model_validate(report.body)
        except ValidationError:
            continue  # an agent of another version, in a pod that is being replaced
    return found


def living(pods: Iterable[Object]) -> list[Object]:
    """Pods that serve or will serve."""
    return [
        pod
        for pod in pods
        if not pod["metadata"].get("deletionTimestamp")
        and pod.get("status", {}).get("phase", "Pending") in ("Pending", "Running")
    ]


def ready(pod: Object) -> bool:
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in pod.get("status", {}).get("conditions") or []
    )


def problem(
    deployment: Object | None, pods: Sequence[Object], explanations: Mapping[str, tuple[str, str]]
) -> Problem | None:
    """The first lasting problem of a pod that is not ready, else the first passing one."""
    waiting = [pod for pod in pods if not ready(pod)]
    found = [trouble for pod in waiting if (trouble := _problem_of(pod) or _explained(pod, explanations)) is not None]
    if (refused := _not_created(deployment)) is not None:
        found.append(refused)
    return next((trouble for trouble in found if trouble.lasting), found[0] if found else None)


def _explained(pod: Object, explanations: Mapping[str, tuple[str, str]]) -> Problem | None:
    """What only Events say of a pod: a volume that cannot be mounted."""
    explanation = explanations.get(pod["metadata"]["uid"])
    return Problem(*explanation, lasting=False) if explanation else None


def _not_created(deployment: Object | None) -> Problem | None:
    """A quota, or a policy such as Pod Security, keeps the pods from being created."""
    for condition in (deployment or {}).get("status", {}).get("conditions") or []:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return Problem("PodNotCreated", condition.get("message", "the pods may not be created"), True)
    return None


def _problem_of(pod: Object) -> Problem | None:
    status = pod.get("status", {})
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            text = condition.get("message", "") or "no node can take the pod"
            return Problem("Unschedulable", f"{text}: add such a node, or change resources or podTemplate", False)
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for container in containers:
        if (trouble := _problem_in(pod["metadata"]["name"], container)) is not None:
            return trouble
    return None


def _problem_in(pod: str, container: Object) -> Problem | None:
    waiting = container.get("state", {}).get("waiting") or {}
    reason, message, name = waiting.get("reason", ""), waiting.get("message", ""), container["name"]
    if reason in _PULL:
        return Problem(
            "ImagePullFailed",
            f"{name}: {message or container.get('image', '')}: check the image name, podTemplate.imagePullSecrets "
            "and the registry",
            True,
        )
    if reason in _CONFIG:
        return Problem("MissingReference", f"{name}: {message}: create it in this namespace", True)
    ended = container.get("lastState", {}).get("terminated") or {}
    if reason == "CrashLoopBackOff" or (ended and container.get("restartCount", 0) >= 3 and not container.get("ready")):
        return _crashed(pod, name, ended)
    return None


def _crashed(pod: str, name: str, ended: Object) -> Problem:
    if ended.get("reason") == "OOMKilled":
        return Problem("OutOfMemory", f"{name} used more memory than its limit: raise resources.memory", True)
    words = str(ended.get("message", "")).strip().splitlines()[-3:]
    last = " ".join(line.strip() for line in words)[-500:]
    text = f"{name} ends with exit code {ended.get('exitCode', '?')}"
    hint = f"kubectl logs {pod} -c {name} --previous"
    return Problem("CrashLoop", f"{text}: {last} ({hint})" if last else f"{text}: {hint}", True)


@dataclass(frozen=True)
class Merged:
    """What the merge step left: the delta that it measured, or why it failed."""

    logprob_delta: float | None = None
    reason: str = ""
    message: str = ""


def merged(pods: Sequence[Object]) -> Merged | None:
    """The newest merge step's result, from its termination message."""
    for pod in sorted(pods, key=lambda p: times.parse(p["metadata"]["creationTimestamp"]), reverse=True):
        for container in pod.get("status", {}).get("initContainerStatuses") or []:
            if container["name"] != "merge":
                continue
            ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
            if ended and (result := _merge_result(ended.get("message", ""))) is not None:
                return result
    return None


def _merge_result(text: str) -> Merged | None:
    try:
        result = MergeResult.model_validate_json(text)
    except ValidationError:
        return None  # the last lines of the log, when it was killed
    if result.failure is not None:
        return Merged(reason=result.failure.reason, message=result.failure.message)
    return Merged(logprob_delta=result.logprob_delta)


def main_digest(report: AgentReport, name: str) -> str:
    """The short digest that answers for a name in one pod, beside a canary perhaps; empty when none does."""
    routes = [route for route in report.served.get(name, []) if not route.trial]
    return max(routes, key=lambda route: route.weight).model.rpartition("@")[2] if routes else ""


def adapter_in(report: AgentReport, name: str, digest: str) -> AdapterReport | None:
    return next((a for a in report.adapters if a.name == name and a.digest == digest), None)
