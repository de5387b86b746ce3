"""The processes of the embedded cluster's pods: its node is this machine."""

from __future__ import annotations

from pathlib import Path


def process_of(pod_uid: str, command: bytes) -> int:
    """The process id, on this machine, of the pod's process whose command line contains `command`."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            groups, line = (process / "cgroup").read_text(), (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if (pod_uid in groups or pod_uid.replace("-", "_") in groups) and command in line:
            return int(process.name)
    raise AssertionError(f"no process with {command.decode()!r} of pod {pod_uid} on this machine")
