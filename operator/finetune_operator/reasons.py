"""Every reason that a FineTune can show, in one table: what it does to the run, and what helps.

Reasons of the trainer are named in finetune_trainer/failures.py; a unit test holds the two lists together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# never            the run fails at once: nothing changes by trying again
# infrastructure   tried again after a pause, out of spec.retry.infrastructure
# unforeseen       as infrastructure, but only once as long as the run has made no step: what is no accident, a bug or
#                  a limit, comes again at once
# outOfMemory      tried again with half the micro batch, out of spec.retry.outOfMemory
# free             tried again at once, at no cost: the run was interrupted, not at fault
Retry = Literal["never", "infrastructure", "unforeseen", "outOfMemory", "free"]


@dataclass(frozen=True)
class Failure:
    """How an attempt that failed for some reason goes on; `hint` is what a person can do about it."""

    retry: Retry
    hint: str = ""


# What is mended outside of the object changes nothing in it: this makes a failed run start again.
TRY_AGAIN = "then set suspend to true and back to false to try again"

FAILURES: dict[str, Failure] = {
    # -- what was asked for cannot be done
    "InvalidDataset": Failure("never", "correct the rows named above, or set dataset.onInvalidRow: Skip"),
    "DatasetNotFound": Failure(
        "never", f"correct dataset.train (or dataset.evaluation), or put the file there, {TRY_AGAIN}"
    ),
    "InvalidTask": Failure("never", "correct evaluation.tasks as said above"),
    "BaseModelNotFound": Failure("never", f"correct baseModel, or put the model there, {TRY_AGAIN}"),
    "BaseModelGated": Failure(
        "never",
        f"accept the model's terms on the hub with the account of the token in baseModel.huggingFace, {TRY_AGAIN}",
    ),
    "HubUnauthorized": Failure("never", f"correct the token in the Secret that tokenSecretRef names, {TRY_AGAIN}"),
    "StorageUnauthorized": Failure(
        "never", f"correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the storage Secret, {TRY_AGAIN}"
    ),
    "UnsupportedCombination": Failure("never", "change one of the named fields"),
    "DoesNotFit": Failure("never", "use one of the changes named above, or a larger GPU and resources.gpuMemory"),
    "NonFiniteLoss": Failure("never", "lower training.learningRate, or set training.precision: FP32"),
    "GPUNotVisible": Failure("never", f"check the node's GPU driver and podTemplate.runtimeClassName, {TRY_AGAIN}"),
    "WorldSizeMismatch": Failure("infrastructure", "check resources.gpus and resources.nodes against the nodes"),
    "PeerLost": Failure(
        "infrastructure",
        "see the nodes' events and the other pods' logs; a NetworkPolicy must let the run's pods reach each other",
    ),
    # -- memory
    "CUDAOutOfMemory": Failure("outOfMemory", "lower training.maxLength or method.lora.rank, or use a larger GPU"),
    "OutOfMemory": Failure(
        "outOfMemory", f"raise resources.memory (for prepare, prepare.memory of the operator's chart), {TRY_AGAIN}"
    ),
    "OutOfMemoryWhileLoading": Failure(
        "never",
        f"raise resources.memory where the pod was killed; for a GPU use QLoRA, a larger one or more of them; {TRY_AGAIN}",
    ),
    # -- the world around the run
    "StorageUnavailable": Failure("infrastructure", "check that the object store is up and its endpoint is right"),
    "HubUnavailable": Failure(
        "infrastructure", "check that the hub can be reached from this cluster, and its words above"
    ),
    "UploadFailed": Failure("infrastructure", "check the object store's free space and its log"),
    "DownloadFailed": Failure("infrastructure", "check the network between the pod and the source"),
    "DigestMismatch": Failure(
        "infrastructure", "the bytes that arrived are not those that were stored: check the store"
    ),
    "DiskFull": Failure("infrastructure", "the node ran out of disk: free some, or steer the pod with podTemplate"),
    "DiskLimitExceeded": Failure(
        "unforeseen", f"raise the ephemeral-storage limit that this namespace's LimitRange sets, {TRY_AGAIN}"
    ),
    "InternalError": Failure("unforeseen", "see the pod's log (kubectl logs); please report it with that log"),
    "ImagePullFailed": Failure("infrastructure", "check the image name, podTemplate.imagePullSecrets and the registry"),
    "Killed": Failure("infrastructure", "see the node's events for what killed it"),
    "NoResult": Failure("infrastructure", "the Job ended without a result: see the pod's log"),
    # -- interrupted: not the run's fault
    "Evicted": Failure("free"),
    "Preempted": Failure("free"),
    "NodeLost": Failure("free"),
    "PodDeleted": Failure("free"),
    "JobDeleted": Failure("free"),
    "Interrupted": Failure("free"),
    # -- limits that were set
    "DeadlineExceeded": Failure("never", "raise activeDeadline to go on from the last checkpoint"),
    "BudgetExceeded": Failure("never", "raise budget to go on from the last checkpoint"),
    # -- the object itself
    "InvalidSpec": Failure("never", "correct the named fields"),
    "JobRefused": Failure("infrastructure", "the API server refused the Job: correct what its message names"),
}

UNKNOWN = Failure("infrastructure", "see the pod's log (kubectl logs)")

# Why a run waits: shown as the reason of Complete=False while nothing has failed.
WAITING: dict[str, str] = {
    "Unschedulable": "no node can take the pod yet; it starts as soon as one can",
    "WaitingForQuota": "Kueue has not admitted the Job yet",
    "ImagePullFailed": "check the image name, podTemplate.imagePullSecrets and the registry",
    "MissingReference": "create the named Secret or ConfigMap (or key) in this namespace; the pod starts by itself then",
    "MountFailed": "create the named volume, Secret or ConfigMap in this namespace; the pod starts by itself then",
    "PodNotCreated": "a quota or a policy of the namespace keeps the pod from being created",
    "StorageUnavailable": "check that the object store is up; the pod goes on by itself as soon as it answers",
    "ContainerCreating": "",
    "Starting": "",
}


def of_failure(reason: str) -> Failure:
    """The row of a reason; unknown ones (a newer trainer's) count as infrastructure."""
    return FAILURES.get(reason, UNKNOWN)


def with_hint(message: str, hint: str) -> str:
    """One text that says what happened and what helps, without saying it twice."""
    if not hint or hint in message:
        return message
    return f"{message.rstrip('. ')}. Fix: {hint}." if message else f"{hint}."
