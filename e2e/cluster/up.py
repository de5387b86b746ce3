"""`make cluster-up`: from nothing, or from whatever is left, to a node that is Ready and a cluster that resolves names."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from typing import Any, cast

from e2e.cluster import images, network, node, pki, preflight, processes, programs, shell, sweep
from e2e.cluster.layout import HERE, NODE, PRETEND_GPUS, RUN, STATE
from e2e.cluster.processes import Process
from e2e.cluster.progress import Refused, say, step
from e2e.cluster.target import EMBEDDED


def up() -> bool:
    """Bring the cluster up; True when anything had to be done."""
    stale = bool(programs.stale_modules() or programs.missing_packages())
    preflight.check()
    programs.install()
    sweep.claim()
    if not RUN.exists():  # a fresh clone, or one whose state was deleted under a running cluster
        sweep.remove(STATE)
    if pki.ensure():
        sweep.remove(STATE)
        shutil.rmtree(STATE / "etcd", ignore_errors=True)
    changed = stale
    if not network.is_up():
        sweep.remove(STATE)  # programs that stayed in a lost namespace cannot be reached any more
        with step("network namespace"):
            network.up()
        changed = True
    _make_cgroups()
    fresh = not (STATE / "etcd").exists()
    changed |= bool(_start_programs(fresh))
    changed |= _pretend_gpus()
    changed |= _apply_dns()
    return changed


def _start_programs(fresh: bool) -> list[Process]:
    """Start what does not run, in the order in which one needs the other; the started ones."""
    containerd = node.containerd(images.PAUSE.reference)
    first = [node.etcd(), node.registry(), containerd, node.apiserver()]
    second = [node.controller_manager(), node.scheduler(), node.kubelet(), node.proxy()]
    started = _start(first)
    if containerd in started:
        _until("containerd", containerd, lambda: shell.succeeds(*images.ctr("version")))
        if fresh and _forget_containers():
            processes.start(containerd)  # its CRI part reads them once, at the start
            _until("containerd", containerd, lambda: shell.succeeds(*images.ctr("version")))
    if node.registry() in started:
        _until("the image registry", node.registry(), images.registry_answers)
    images.ensure((images.PAUSE,), EMBEDDED)
    if started or any(processes.running(process) is None for process in second):
        with step("kube-apiserver ready", node.apiserver().log):
            _until(
                "kube-apiserver", node.apiserver(), lambda: shell.succeeds(*EMBEDDED.kubectl("get", "--raw", "/readyz"))
            )
    heartbeat = _heartbeat(_node_status())
    started += _start(second)
    if node.kubelet() in started:
        with step(f"node {NODE} Ready", node.kubelet().log):
            _until(
                "the node",
                node.kubelet(),
                lambda: _is_ready(status := _node_status()) and _heartbeat(status) != heartbeat,
            )
    for process in [*first, *second]:
        processes.require(process)
    return started


def _start(wanted: list[Process]) -> list[Process]:
    """Start, all at once, those that do not run or run with another configuration."""
    to_start = [process for process in wanted if processes.running(process) is None]
    for process in to_start:
        processes.start(process)
    if to_start:
        say(f"  started {', '.join(process.name for process in to_start)} (logs: {to_start[0].log.parent})")
    return to_start


def _forget_containers() -> bool:
    """Remove another cluster's containers from containerd's shared store, images stay; True when there were any."""
    found = shell.output(*images.ctr("containers", "ls", "-q"), check=False).split()
    if found:
        shell.output(*images.ctr("containers", "rm", *found), check=False)
    return bool(found)


def _node_status() -> dict[str, Any]:
    text = shell.output(*EMBEDDED.kubectl("get", "node", NODE, "-o", "json", "--ignore-not-found"), check=False)
    return cast(dict[str, Any], json.loads(text)["status"]) if text.strip() else {}


def _ready_condition(status: dict[str, Any]) -> dict[str, str]:
    return next((condition for condition in status.get("conditions", []) if condition["type"] == "Ready"), {})


def _is_ready(status: dict[str, Any]) -> bool:
    return _ready_condition(status).get("status") == "True"


def _heartbeat(status: dict[str, Any]) -> str | None:
    """Changes once a restarted kubelet speaks for itself: for 40 s its predecessor's Ready would stand."""
    return _ready_condition(status).get("lastHeartbeatTime")


def _pretend_gpus() -> bool:
    """Advertise GPUs that are not there, so that scheduling by GPU is real; a node that registers anew has none."""
    if _node_status().get("allocatable", {}).get("nvidia.com/gpu") == str(PRETEND_GPUS):
        return False
    patch = [
        {"op": "add", "path": f"/status/{field}/nvidia.com~1gpu", "value": str(PRETEND_GPUS)}
        for field in ("capacity", "allocatable")
    ]
    shell.output(
        *EMBEDDED.kubectl("patch", "node", NODE, "--subresource=status", "--type=json", "-p", json.dumps(patch))
    )
    return True


def _apply_dns() -> bool:
    manifest = (HERE / "coredns.yaml").read_text().replace("COREDNS_IMAGE", images.COREDNS.reference)
    available = shell.output(
        *EMBEDDED.kubectl("-n", "kube-system", "get", "deployment", "coredns", "--ignore-not-found"),
        "-o",
        "jsonpath={.status.availableReplicas} {.spec.template.spec.containers[0].image}",
        check=False,
    )
    if available == f"1 {images.COREDNS.reference}":
        return False
    images.ensure((images.COREDNS,), EMBEDDED)
    with step("CoreDNS"):
        shell.output(*EMBEDDED.kubectl("apply", "-f", "-"), stdin=manifest)
        shell.output(
            *EMBEDDED.kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=120s")
        )
    return True


def _until(what: str, process: Process, ready: Callable[[], bool], patience: float = 180) -> None:
    deadline = time.monotonic() + patience
    while not ready():
        processes.require(process)
        if time.monotonic() > deadline:
            raise Refused(f"{what} is not ready after {patience:.0f}s; the log is {process.log}")
        time.sleep(0.1)


def _make_cgroups() -> None:
    """The folder below which the kubelet keeps its pods, in each cgroup hierarchy."""
    for folder in sweep.cgroup_roots():
        if folder.exists():
            continue
        folder.mkdir()
        # The default weighs all pods together as one process of the host; then a compiler beside them starves them.
        for setting, weight in (("cpu.shares", "8192"), ("cpu.weight", "800")):
            if (folder / setting).exists():
                (folder / setting).write_text(weight)
        for setting in ("cpuset.cpus", "cpuset.mems"):  # version 1 starts a child without any CPU
            if (folder / setting).exists() and (folder.parent / setting).exists():
                (folder / setting).write_text((folder.parent / setting).read_text())
        for level in (folder.parent, folder):  # version 2 hands no controller down by itself
            control = level / "cgroup.subtree_control"
            if control.exists() and (level / "cgroup.controllers").exists():
                for controller in (level / "cgroup.controllers").read_text().split():
                    try:
                        control.write_text(f"+{controller}")
                    except OSError:
                        continue
