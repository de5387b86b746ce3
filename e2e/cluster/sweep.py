"""Takes everything of a cluster away again, also what a killed run left behind, and says who holds the machine's one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from e2e.cluster import network, processes, shell
from e2e.cluster.layout import BUILDAH_STORAGE, CGROUP, CNI_NETWORK, CONTAINERD_ROOT, MACHINE, OWNER, STATE
from e2e.cluster.progress import Refused

CONTROL_PLANE = ("etcd", "kube-apiserver", "kubelet")


def claim() -> None:
    """Make this clone the owner of the machine's one cluster; a dead clone's leftovers are removed first."""
    owner = Path(OWNER.read_text()) if OWNER.exists() else None
    if owner and owner != STATE:
        refuse_if_alive(owner)
        remove(owner)
    MACHINE.mkdir(parents=True, exist_ok=True)
    OWNER.write_text(str(STATE))


def refuse_if_alive(owner: Path) -> None:
    running = {processes.program(pid) for pid in processes.in_namespace()}
    if owner.exists() and any(program in running for program in CONTROL_PLANE):
        raise Refused(
            f"another clone's cluster is running on this machine; stop it first: make -C {owner.parent} cluster-down"
        )


def remove(state: Path) -> None:
    """Processes, mounts, cgroups, namespace and link of the cluster with this state folder; its files stay."""
    _kill_everything()
    _unmount(state)
    _unmount(MACHINE)
    _unmount(CONTAINERD_ROOT)
    _remove_cgroups()
    network.down()
    for record in Path("/var/lib/cni/results").glob(f"{CNI_NETWORK}-*"):
        record.unlink(missing_ok=True)
    for link in Path("/var/log/containers").glob("*.log"):  # the kubelet's, dangling now
        if str(state) in os.readlink(link):
            link.unlink(missing_ok=True)


def unmount_builds() -> None:
    """Mounts of image builds that were killed; called only where no build can be running."""
    _unmount(BUILDAH_STORAGE)


def _kill_everything() -> None:
    """First the programs that start others, then the pods, then whatever is left; nothing here needs a farewell."""
    deadline = time.monotonic() + 30
    while victims := processes.in_namespace() | _in_cgroups():
        starters = {pid for pid in victims if processes.program(pid) in ("kubelet", "containerd")}
        for pid in starters or victims:
            processes.kill(pid, signal.SIGKILL, patience=5)
        if time.monotonic() > deadline:
            raise Refused(f"these processes of the cluster cannot be killed: {sorted(victims)}")


def cgroup_roots() -> list[Path]:
    """Our folder in each cgroup hierarchy, whether it exists or not."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(target) / CGROUP for _, target, kind, *_ in mounts if kind in ("cgroup", "cgroup2")]


def _cgroup_folders() -> list[Path]:
    """Ours and all below, the deepest first."""
    return [Path(folder) for root in cgroup_roots() for folder, _, _ in os.walk(root, topdown=False)]


def _in_cgroups() -> set[int]:
    pids: set[int] = set()
    for folder in _cgroup_folders():
        try:
            pids.update(int(pid) for pid in (folder / "cgroup.procs").read_text().split())
        except OSError:
            continue
    return pids - {0}


def _remove_cgroups() -> None:
    deadline = time.monotonic() + 10
    while folders := _cgroup_folders():
        for folder in folders:
            try:
                folder.rmdir()
            except OSError:  # a process in it is still ending
                time.sleep(0.02)
        if time.monotonic() > deadline:
            raise Refused(f"the cgroup {folders[-1]} cannot be removed: something still runs in it")


def _unmount(below: Path) -> None:
    """Everything mounted under a folder, the last mounted first."""
    # A mount point's spaces are written as \\040; none of our paths below the clone has one, a clone's may.
    prefix = str(below).replace(" ", "\\040") + "/"
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for target in reversed([target for target in targets if target.startswith(prefix)]):
        shell.output("umount", "--lazy", target.replace("\\040", " "), check=False)
