"""Long-running programs inside the network namespace: started once, recognised again, stopped for good.

A program writes its own pid file before it becomes the program, and carries a fingerprint of its command and
configuration in its environment: whatever was killed in between, the next run knows what is there and whether it fits.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import shell
from e2e.cluster.layout import LOGS, NETNS_PATH, RUN
from e2e.cluster.progress import Refused

MARK = "FINETUNE_CLUSTER_PROCESS"


@dataclass(frozen=True)
class Process:
    """A program, its arguments, and the configuration files that are written before it starts."""

    name: str
    command: tuple[str, ...]
    configs: tuple[tuple[Path, str], ...] = ()

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"

    @property
    def pid_file(self) -> Path:
        return RUN / f"{self.name}.pid"

    def fingerprint(self) -> str:
        binary = Path(self.command[0]).stat()
        parts = (self.command, self.configs, binary.st_mtime_ns, binary.st_size)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def mark(self) -> str:
        return f"{self.name}/{self.fingerprint()}"


def running(process: Process) -> int | None:
    """The pid of this very program with this very configuration, in this very namespace."""
    pid = _started(process)
    return pid if pid in in_namespace() else None


def start(process: Process) -> None:
    stop(process)
    for path, text in process.configs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    process.log.parent.mkdir(parents=True, exist_ok=True)
    process.pid_file.parent.mkdir(parents=True, exist_ok=True)
    with process.log.open("ab") as log:
        subprocess.Popen(
            [*shell.IN_NAMESPACE, *process.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, MARK: process.mark()},
            start_new_session=True,
            preexec_fn=lambda: process.pid_file.write_text(f"{os.getpid()}\n") and None,  # noqa: PLW1509 (we have no threads)
        )


def stop(process: Process) -> None:
    """End this program, and any copy of it whose pid file was lost; it must not run twice on the same data."""
    for pid in in_namespace():
        # A container's shim inherits the mark of containerd, but is another program.
        if (_mark(pid) or "").startswith(process.name + "/") and program(pid) in (
            Path(process.command[0]).name,
            "nsenter",
        ):
            kill(pid, signal.SIGTERM, patience=10)
    process.pid_file.unlink(missing_ok=True)


def require(process: Process) -> None:
    """Say why a program that should be running is not; one that is only about to enter the namespace is."""
    if _started(process) is None:
        lines = process.log.read_text(errors="replace").splitlines()[-5:] if process.log.exists() else []
        raise Refused("\n".join([*lines, f"{process.name} stopped by itself; its log is {process.log}"]))


def _started(process: Process) -> int | None:
    try:
        pid = int(process.pid_file.read_text())
    except (OSError, ValueError):
        return None
    return pid if _mark(pid) == process.mark() else None


def in_namespace() -> set[int]:
    """Every process whose network is the cluster's: our programs and the shims of containers, not the pods."""
    try:
        namespace = NETNS_PATH.stat().st_ino
    except OSError:
        return set()
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "ns" / "net").stat().st_ino == namespace:
                    found.add(int(entry.name))
            except OSError:  # it ended, or is a zombie
                continue
    return found


def kill(pid: int, how: signal.Signals, patience: float) -> None:
    """Signal a process and wait until it is gone; after `patience` seconds it is killed."""
    deadline = time.monotonic() + patience
    try:
        os.kill(pid, how)
        while _alive(pid):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    except ProcessLookupError:
        pass


def _alive(pid: int) -> bool:
    try:
        os.waitpid(pid, os.WNOHANG)  # reap it when it is our own child
    except ChildProcessError:
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _mark(pid: int) -> str | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    for entry in environment.split(b"\0"):
        if entry.startswith(MARK.encode() + b"="):
            return entry.split(b"=", 1)[1].decode()
    return None


def program(pid: int) -> str:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name.removesuffix(" (deleted)")
    except OSError:
        return ""
