"""What must hold before anything is changed: one clear line for whatever does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from e2e.cluster import network, tools
from e2e.cluster.layout import CACHE, STATE
from e2e.cluster.progress import Refused

GIB = 1 << 30
LONGEST_STATE_PATH = 70  # the kubelet puts sockets below it, and a socket's path ends at 107 characters


def check(disk_gib: int) -> None:
    if os.geteuid() != 0:
        raise Refused("the embedded cluster needs root (namespaces, mounts, cgroups): run make as root, or set KUBECONFIG to use your own cluster")
    if not Path("/proc/self/ns/net").exists():
        raise Refused("the embedded cluster needs Linux with network namespaces; set KUBECONFIG to use your own cluster")
    if len(str(STATE)) > LONGEST_STATE_PATH:
        raise Refused(f"the path of this clone is too long for the kubelet's sockets ({STATE}): clone it closer to the root")
    tools.check()
    if shutil.which("ip"):
        network.check()
    check_disk(disk_gib)


def check_disk(disk_gib: int) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free / GIB
    if free < disk_gib:
        raise Refused(f"too little disk: {CACHE} has {free:.0f} GiB free and {disk_gib} GiB are needed; free some, or set XDG_CACHE_HOME to a larger disk")
