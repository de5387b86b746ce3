"""What the operator may not do, asked of the API server."""

from __future__ import annotations

import pytest

from e2e.cluster.layout import SYSTEM_NAMESPACE
from e2e.kubectl import Kubectl, KubectlFailed

OPERATOR = f"system:serviceaccount:{SYSTEM_NAMESPACE}:finetune-operator"


def may(kubectl: Kubectl, verb: str, resource: str, *more: str) -> bool:
    try:
        return kubectl.run("auth", "can-i", verb, resource, "--as", OPERATOR, "-n", "demo", *more).strip() == "yes"
    except KubectlFailed as answer:
        # `no` comes with exit status 1.
        assert str(answer).endswith("no"), answer
        return False


@pytest.mark.parametrize("verb", ["get", "list", "watch", "create", "update", "patch", "delete"])
def test_the_operator_cannot_touch_secrets(kubectl: Kubectl, verb: str) -> None:
    assert not may(kubectl, verb, "secrets")
    assert not may(kubectl, verb, "secrets", "--all-namespaces")


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("update", "finetunes.finetune.dev"),
        ("create", "finetunes.finetune.dev"),
        ("update", "adapterdeployments.finetune.dev"),
        ("create", "pods"),
        ("create", "pods/exec"),
        ("create", "serviceaccounts/token"),
        ("create", "clusterrolebindings.rbac.authorization.k8s.io"),
        ("patch", "nodes"),
    ],
)
def test_the_operator_cannot_write_what_is_not_its_own(kubectl: Kubectl, verb: str, resource: str) -> None:
    assert not may(kubectl, verb, resource)


def test_the_operator_can_do_its_work(kubectl: Kubectl) -> None:
    assert may(kubectl, "create", "jobs.batch")
    assert may(kubectl, "update", "finetunes.finetune.dev/status")
