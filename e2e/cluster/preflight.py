"""What must hold before anything is changed: one clear line for whatever does not."""

from __future__ import annotations

import os
import shutil

from e2e.cluster import network, programs
from e2e.cluster.layout import CACHE, STATE
from e2e.cluster.progress import Refused

GIB = 1 << 30
COLD_BUILD_GIB, RUNNING_GIB = 12, 3  # Go's module and build caches; what pods write
LONGEST_STATE_PATH = 70  # the kubelet puts sockets below it, and a socket's path ends at 107 characters


def check() -> None:
    require_root()
    if len(str(STATE)) > LONGEST_STATE_PATH:
        raise Refused(f"this clone's path is too long for the kubelet's sockets ({STATE}): clone it closer to the root")
    if shutil.which("ip"):
        network.check()
    check_programs()


def check_programs() -> None:
    require_root()
    programs.check()
    check_disk(COLD_BUILD_GIB if programs.stale_modules() else RUNNING_GIB, "the cluster")


def require_root() -> None:
    if os.geteuid() != 0:
        raise Refused(
            "the embedded cluster needs root, for namespaces, mounts and cgroups: run make as root, or set KUBECONFIG"
            " and REGISTRY to use a cluster of yours"
        )


def check_disk(gib: int, what: str) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free / GIB
    if free < gib:
        raise Refused(
            f"too little disk: {what} needs {gib} GiB and {CACHE} has {free:.0f} GiB free;"
            " free some, or set XDG_CACHE_HOME to a larger disk"
        )
