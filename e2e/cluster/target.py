"""The cluster that commands talk to: the embedded one, or the user's own."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import shell
from e2e.cluster.layout import BIN, IMAGE_PREFIX, KUBECONFIG, NODE_IP, RELEASE
from e2e.cluster.progress import Refused


@dataclass(frozen=True)
class Target:
    """A kubeconfig, the registry as the nodes name it, and the same registry as this machine reaches it."""

    kubeconfig: Path
    embedded: bool
    pull_from: str
    push_to: str

    def kubectl(self, *arguments: str) -> list[str]:
        return [_program("kubectl"), "--kubeconfig", str(self.kubeconfig), *arguments]

    def helm(self, *arguments: str) -> list[str]:
        return [_program("helm"), "--kubeconfig", str(self.kubeconfig), *arguments]


EMBEDDED = Target(KUBECONFIG, True, IMAGE_PREFIX, f"{NODE_IP}:5000/{RELEASE}")


def target() -> Target:
    """The user's cluster when KUBECONFIG names another one or CLUSTER=existing, else the embedded one."""
    named = os.environ.get("KUBECONFIG", "")
    own = named and Path(named).resolve() != KUBECONFIG.resolve()
    if not own and os.environ.get("CLUSTER") != "existing":
        return EMBEDDED
    registry = os.environ.get("REGISTRY", "").rstrip("/")
    return Target(Path(named or Path.home() / ".kube" / "config"), False, registry, registry)


def check_reachable(cluster: Target) -> str:
    """The address of the user's cluster; refuses with the reason when it does not answer."""
    if not cluster.kubeconfig.exists():
        raise Refused(f"no kubeconfig at {cluster.kubeconfig}; set KUBECONFIG, or unset it to use the embedded cluster")
    try:
        shell.output(*cluster.kubectl("version", "--request-timeout=10s"))
    except Refused as reason:
        raise Refused(f"the cluster of {cluster.kubeconfig} does not answer: {reason}") from None
    return shell.output(*cluster.kubectl("config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"))


def require_registry(cluster: Target) -> None:
    if not cluster.pull_from:
        raise Refused("set REGISTRY to one (host/path) that your cluster pulls from and `buildah login` knows")


def _program(name: str) -> str:
    ours = BIN / name
    found = str(ours) if ours.exists() else shutil.which(name)
    if not found:
        raise Refused(
            f"{name} is not installed; install it, or run `make cluster-up` without KUBECONFIG once to build it"
        )
    return found
