"""What the operator may and may not do, asked of the API server."""

from __future__ import annotations

import json

import pytest

from e2e.cases.objects import finetune
from e2e.cluster.layout import SYSTEM_NAMESPACE
from e2e.kubectl import Kubectl, KubectlFailed, Object

OPERATOR = f"system:serviceaccount:{SYSTEM_NAMESPACE}:finetune-operator"


def may(kubectl: Kubectl, verb: str, resource: str, group: str = "", namespace: str = "demo") -> bool:
    """Whether the operator's ServiceAccount is allowed to; `resource` may name a subresource, "" is every namespace."""
    name, _, subresource = resource.partition("/")
    attributes: Object = {"verb": verb, "group": group, "resource": name, "namespace": namespace}
    if subresource:
        attributes["subresource"] = subresource
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": OPERATOR, "resourceAttributes": attributes},
    }
    answer = json.loads(kubectl.run("create", "-f", "-", "-o", "json", stdin=json.dumps(review)))
    return bool(answer["status"]["allowed"])


@pytest.mark.parametrize("verb", ["get", "list", "watch", "create", "update", "patch", "delete"])
def test_the_operator_cannot_touch_secrets(kubectl: Kubectl, verb: str) -> None:
    for namespace in ("demo", SYSTEM_NAMESPACE, ""):
        assert not may(kubectl, verb, "secrets", namespace=namespace)


@pytest.mark.parametrize(
    ("verb", "resource", "group"),
    [
        ("create", "finetunes", "finetune.dev"),
        ("update", "finetunes", "finetune.dev"),
        ("patch", "adapterdeployments", "finetune.dev"),
        ("update", "adapterdeployments", "finetune.dev"),
        ("create", "pods", ""),
        ("create", "pods/exec", ""),
        ("create", "serviceaccounts/token", ""),
        ("create", "clusterrolebindings", "rbac.authorization.k8s.io"),
        ("patch", "nodes", ""),
    ],
)
def test_the_operator_cannot_write_what_is_not_its_own(kubectl: Kubectl, verb: str, resource: str, group: str) -> None:
    assert not may(kubectl, verb, resource, group)


@pytest.mark.parametrize(
    ("verb", "resource", "group"),
    [("create", "jobs", "batch"), ("update", "finetunes/status", "finetune.dev"), ("create", "deployments", "apps")],
)
def test_the_operator_can_do_its_work(kubectl: Kubectl, verb: str, resource: str, group: str) -> None:
    assert may(kubectl, verb, resource, group)


@pytest.mark.parametrize("change", [{"spec": {"suspend": False}}, {"metadata": {"labels": {"team": "a"}}}])
def test_of_a_finetune_the_operator_may_change_nothing_but_finalizers(
    kubectl: Kubectl, namespace: str, change: Object
) -> None:
    kubectl.apply(finetune("mine", namespace, seed=1, suspend=True))
    patch = ("patch", "finetune", "mine", "-n", namespace, "--as", OPERATOR, "--type=merge", "--dry-run=server", "-p")
    with pytest.raises(KubectlFailed, match="writes nothing of a FineTune but its finalizer"):
        kubectl.run(*patch, json.dumps(change))
    kubectl.run(*patch, json.dumps({"metadata": {"finalizers": ["finetune.dev/artifacts"]}}))
