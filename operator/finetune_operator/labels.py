"""Names that children carry: labels, annotations, the token's audience, and the owner reference."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.common import GROUP

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "finetune-operator"
# Server-side filter of everything that we watch besides our two kinds.
SELECTOR = f"{MANAGED_BY}={MANAGER}"

OWNER_LABEL = {"FineTune": f"{GROUP}/finetune", "AdapterDeployment": f"{GROUP}/adapterdeployment"}
STAGE = f"{GROUP}/stage"
INPUTS = f"{GROUP}/inputs"
ATTEMPT = f"{GROUP}/attempt"
OWNER_UID = f"{GROUP}/owner-uid"  # on a clean-up Job, which has no owner reference
RUN_SPEC = f"{GROUP}/run-spec"  # annotation on pods: the run spec, mounted through the downward API
REPORT_AUDIENCE = "finetune-operator"  # of the projected tokens with which pods report
# Put on pods by the Job controller.
JOB_NAME = "batch.kubernetes.io/job-name"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"


def of_owner(kind: str, name: str) -> dict[str, str]:
    """The labels by which the children of one object are found."""
    return {MANAGED_BY: MANAGER, OWNER_LABEL[kind]: name}


def first_of_its_job(pod: dict[str, Any]) -> bool:
    """Whether a pod speaks for its Job: of several pods only the first one does."""
    return bool(pod["metadata"].get("labels", {}).get(COMPLETION_INDEX, "0") == "0")


def owner_reference(parent: dict[str, Any]) -> dict[str, Any]:
    """`parent` as the controller of a child.

    Not kopf.adopt: that copies all of the parent's labels, among them those by which Argo CD and Kueue track it.
    """
    return {
        "apiVersion": parent["apiVersion"],
        "kind": parent["kind"],
        "name": parent["metadata"]["name"],
        "uid": parent["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
