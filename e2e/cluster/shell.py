"""Runs programs: quietly, with their output in a log, or inside the cluster's network namespace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from e2e.cluster.layout import NETNS_PATH
from e2e.cluster.progress import Refused

IN_NAMESPACE = ["nsenter", f"--net={NETNS_PATH}"]  # not `ip netns exec`: that remounts /sys and hides the cgroups


def output(
    *command: str | Path, check: bool = True, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Standard output of a command; a failure carries the last line it wrote."""
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        capture_output=True,
        text=True,
        input=stdin,
        env={**os.environ, **(env or {})},
    )
    if check and done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise Refused(f"{Path(command[0]).name} failed ({done.returncode}): {last}")
    return done.stdout


def succeeds(*command: str | Path) -> bool:
    return subprocess.run([str(part) for part in command], capture_output=True, check=False).returncode == 0


def logged(
    command: Sequence[str | Path], log: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> None:
    """Run a long command with everything it prints in `log`; a failure shows its last lines."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as sink:
        sink.write("+ " + " ".join(str(part) for part in command) + "\n")
        sink.flush()
        code = subprocess.run(
            [str(part) for part in command],
            check=False,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env={**os.environ, **(env or {})},
        ).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise Refused(f"{tail}\n{Path(command[0]).name} failed ({code}); the whole output is in {log}")
