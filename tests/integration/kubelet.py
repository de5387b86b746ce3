"""Plays the Job controller and the kubelet: no controllers run beside the tests' API server.

The pods and the statuses are what a real cluster writes, and the API server validates them.
"""

import datetime as dt
import itertools
import json
from typing import Any

from .apiserver import ApiError, Client, Object

_numbers = itertools.count(1)


def now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def start_pod(kube: Client, job: Object, index: int | None = None) -> Object:
    """The Job's pod, bound to a node and running; of an indexed Job that of an index."""
    meta = job["metadata"]
    template = job["spec"]["template"]
    indexed = {} if index is None else {"batch.kubernetes.io/job-completion-index": str(index)}
    pod = kube.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{meta['name']}-{next(_numbers)}",
                "namespace": meta["namespace"],
                "labels": template["metadata"]["labels"] | indexed,
                "ownerReferences": [
                    {
                        "apiVersion": "batch/v1",
                        "kind": "Job",
                        "name": meta["name"],
                        "uid": meta["uid"],
                        "controller": True,
                    }
                ],
            },
            # The account is what the ServiceAccount plugin fills in, the node what the scheduler does.
            "spec": {"serviceAccountName": "default", **template["spec"], "nodeName": "node-1"},
        }
    )
    state = {"running": {"startedAt": now()}}
    return set_pod(kube, pod, phase="Running", startTime=now(), containerStatuses=[_container(state)])


def set_pod(kube: Client, pod: Object, **status: Any) -> Object:
    return kube.merge(pod, {"status": status}, "status")


def end_pod(kube: Client, pod: Object, exit_code: int = 0, message: str = "", reason: str = "") -> Object:
    """The container's end, with its termination message."""
    ended = {"exitCode": exit_code, "finishedAt": now(), "startedAt": pod["status"]["startTime"], "message": message}
    ended["reason"] = reason or ("Completed" if exit_code == 0 else "Error")
    phase = "Succeeded" if exit_code == 0 else "Failed"
    return set_pod(kube, pod, phase=phase, containerStatuses=[_container({"terminated": ended})])


def end_job(kube: Client, job: Object, kind: str) -> None:
    """`Complete` or `Failed`, as the Job controller writes it."""
    target = {"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[kind]
    conditions = [
        {"type": t, "status": "True", "reason": "Test", "lastProbeTime": now(), "lastTransitionTime": now()}
        for t in (target, kind)
    ]
    status: Object = {"startTime": now(), "conditions": conditions, "uncountedTerminatedPods": {}}
    status |= {"succeeded": 1, "completionTime": now()} if kind == "Complete" else {"failed": 1}
    kube.merge(job, {"status": status}, "status")


def delete_pods(kube: Client, job: Object) -> None:
    """What the garbage collector and the kubelet do once a Job is deleted."""
    namespace = job["metadata"]["namespace"]
    for pod in kube.get(f"/api/v1/namespaces/{namespace}/pods")["items"]:
        if any(o["uid"] == job["metadata"]["uid"] for o in pod["metadata"].get("ownerReferences", [])):
            kube.request(
                "DELETE",
                f"/api/v1/namespaces/{namespace}/pods/{pod['metadata']['name']}",
                {"gracePeriodSeconds": 0},
            )


def token_of(kube: Client, pod: Object, audience: str = "finetune-operator") -> str:
    """The projected token that the kubelet mounts into a pod."""
    namespace = pod["metadata"]["namespace"]
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": namespace}}
    try:
        kube.create(account)
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise
    bound = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    answer = kube.request(
        "POST",
        f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token",
        {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": [audience], "expirationSeconds": 600, "boundObjectRef": bound},
        },
    )
    return str(answer["status"]["token"])


def run_spec(job: Object) -> Object:
    spec: Object = json.loads(job["spec"]["template"]["metadata"]["annotations"]["finetune.dev/run-spec"])
    return spec


def _container(state: Object) -> Object:
    return {
        "name": "trainer",
        "image": "trainer:1",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": state,
    }
