"""Why a Job failed, and why it waits: the words of kubelet, scheduler and Job controller into reasons of the table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from finetune_operator import labels
from finetune_operator.finetune.readings import (
    CONTAINER,
    Object,
    container_state,
    image,
    newest,
    nodes,
    own_result,
    phase,
)  # fmt: skip
from finetune_trainer.failures import PEER_LOST

INTERRUPTED_EXIT = 143
KILLED_EXIT = 137


def why_failed(job: Object, pods: Sequence[Object], condition: Object) -> tuple[str, str]:
    """Reason and message of a Job that failed, from the pod that failed first."""
    if not pods:
        return "PodDeleted", "the pod was deleted"
    broken = [pod for pod in newest(pods) if phase(pod) != "Succeeded"] or list(pods)
    causes = sorted((_blame(job, pod, condition) for pod in broken), key=lambda blame: blame.order)
    return causes[0].reason, causes[0].message


class _Blame(NamedTuple):
    """Why one of a Job's pods failed. First in `order` is what the others followed from: a pod that only missed
    another one, or was told to stop because of it, comes last."""

    order: tuple[bool, str, bool]
    reason: str
    message: str


def _blame(job: Object, pod: Object, condition: Object) -> _Blame:
    ended = container_state(pod, "terminated") or {}
    told = own_result(job, ended.get("message"))
    if told is not None and told.failure is not None:
        reason, message = told.failure.reason, told.failure.message
        if nodes(job) > 1:
            message = f"pod {pod['metadata']['name']}: {message}"
    else:
        reason, message = why_pod_failed(pod, condition)
    # One second is all that the time resolves.
    return _Blame((reason == PEER_LOST, ended.get("finishedAt") or "~", reason == "Interrupted"), reason, message)


def why_pod_failed(pod: Object, condition: Object) -> tuple[str, str]:
    """Reason and message of a pod that failed without a result."""
    name = pod["metadata"]["name"]
    node = pod["spec"].get("nodeName", "its node")
    ended = container_state(pod, "terminated") or {}
    disruption = _disruption(pod)
    # OOMKilled first: a pod that is killed for memory and evicted for it at once is a matter of memory.
    if ended.get("reason") == "OOMKilled":
        return "OutOfMemory", f"pod {name} used more memory than its limit and was killed (OOMKilled)"
    if pod.get("status", {}).get("reason") == "Evicted":
        message = f"pod {name} was evicted from {node}: {pod['status'].get('message', '').strip()}"
        return own_eviction(pod) or "Evicted", message
    if disruption is not None:
        return disruption, f"pod {name} was taken off {node}"
    if ended.get("exitCode") == INTERRUPTED_EXIT:
        return "Interrupted", f"pod {name} was told to stop and saved a checkpoint"
    if pod["metadata"].get("deletionTimestamp"):
        return "PodDeleted", f"pod {name} was deleted"
    if ended.get("exitCode") == KILLED_EXIT:
        return "Killed", f"the process in pod {name} was killed (exit code 137)"
    if ended:
        last_words = ended.get("message", "").strip().splitlines()[-1:] or [ended.get("reason", "")]
        return "InternalError", f"pod {name} ended with exit code {ended.get('exitCode')}: {last_words[0][:300]}"
    status = pod.get("status", {})
    text = status.get("message") or condition.get("message", "")
    return "InternalError", f"pod {name} failed: {status.get('reason') or condition.get('reason', '')} {text}".strip()


# The reasons of a pod's DisruptionTarget condition.
_DISRUPTIONS = {
    "PreemptionByScheduler": "Preempted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
}


def _disruption(pod: Object) -> str | None:
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return _DISRUPTIONS.get(condition.get("reason", ""), "Evicted")
    return None


def interrupted(pod: Object) -> bool:
    if phase(pod) != "Failed":
        return False
    ended = container_state(pod, "terminated") or {}
    return _disruption(pod) is not None or ended.get("exitCode") == INTERRUPTED_EXIT


# What a container can be stuck in, as the kubelet names it.
_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError")


def why_waiting(job: Object, pods: Sequence[Object], waiting_pods: Sequence[Object]) -> tuple[str, str]:
    """Of the first pod that waits; the others may run already."""
    if job["spec"].get("suspend"):
        queue = job["metadata"]["labels"].get(labels.KUEUE_QUEUE, "")
        return "WaitingForQuota", f"the Job waits in Kueue queue {queue}" if queue else "the Job is suspended"
    if not waiting_pods:
        several = f"{len(pods)} of {nodes(job)} pods are there" if nodes(job) > 1 else "the pod is being created"
        return "Starting", several
    pod = waiting_pods[0]
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return "Unschedulable", condition.get("message", "") or "no node can take the pod"
    waiting = container_state(pod, "waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _PULL:
        return "ImagePullFailed", message or f"{reason}: {image(pod)}"
    if reason in _CONFIG:
        return "MissingReference", message or reason
    return ("ContainerCreating" if reason == "ContainerCreating" else "Starting"), "the pod is starting"


def own_eviction(pod: Object) -> str | None:
    """The reason for which a pod was evicted through its own doing: it would happen to its successor too."""
    status = pod.get("status", {})
    if status.get("reason") != "Evicted":
        return None
    message = status.get("message", "")
    return next((reason for words, reason in _OWN_EVICTIONS.items() if re.search(words, message)), None)


# The kubelet's words (pkg/kubelet/eviction): for a volume with a size limit, for the ephemeral-storage limits of a
# container and of a pod, and for who used more than its request on a node that runs out of something. Nobody requests
# disk, so there the pod is at fault from about a gigabyte on.
_OWN_EVICTIONS = {
    "exceeds the limit|exceeded its local ephemeral storage limit|exceeds the total limit": "DiskLimitExceeded",
    rf"Container {CONTAINER} was using \S+, request is \S+, has larger consumption of memory": "OutOfMemory",
    rf"Container {CONTAINER} was using (\d{{7,}}Ki|\d+[GT]i), request is \S+, has larger consumption of ephemeral": "DiskFull",
}
