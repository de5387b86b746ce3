"""A namespace to work in: restricted pods only, and the credentials of the bucket."""

from __future__ import annotations

from e2e.cluster.layout import SYSTEM_NAMESPACE
from e2e.kubectl import Kubectl, Object
from e2e.storage import SECRET


def prepare_namespace(kubectl: Kubectl, name: str) -> None:
    kubectl.apply(namespace(name))
    given = kubectl.get("secret", SECRET, "-n", SYSTEM_NAMESPACE)
    kubectl.apply(secret(SECRET, name, given["data"]))


def namespace(name: str) -> Object:
    # The strictest of the Pod Security profiles: whatever the operator makes has to meet it.
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def secret(name: str, namespace: str, data: dict[str, str]) -> Object:
    """`data` is base64, as the API server has it."""
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}
