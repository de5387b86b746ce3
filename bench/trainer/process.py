"""One contestant's process, watched from outside: when it says what, and the memory that it takes."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

LOSS = re.compile(r"'loss': '?([0-9.]+(?:e-?[0-9]+)?)'?")


@dataclass(frozen=True)
class Signs:
    """How a contestant's output tells that training is about to begin, and that a step is done."""

    step: re.Pattern[str]
    ready: re.Pattern[str] | None = None


@dataclass
class Trace:
    """What was seen of a run. Seconds count from the start of the process; losses are those of the steps, in order."""

    ready: float | None = None
    ready_cpu: float = 0.0
    steps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # CPU seconds that were used when the steps were done
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def first_step(self) -> float:
        return self.steps[0]

    @property
    def loop_seconds(self) -> float:
        """From the end of the first step, which warms caches, to the end of the last."""
        return self.steps[-1] - self.steps[0]

    @property
    def loop_cpu_seconds(self) -> float:
        """CPU time of the same stretch, on all cores: what it costs, however busy the machine is with other things."""
        return self.cpu[-1] - self.cpu[0]


class Failed(Exception):
    """The contestant ended badly; the message is the end of what it said."""


def cpu_seconds(session: int) -> float:
    """CPU time of all processes of a session so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def watch(command: Sequence[str], signs: Signs, environment: dict[str, str], log: Path, timeout: float) -> Trace:
    """Run a command to its end. Raises: Failed, also when it takes longer than `timeout` seconds.

    Memory is the largest resident set of any one process of it, as the kernel counts it.
    """
    # An image has its libraries compiled, and so has anybody's second run.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    trace, begun = Trace(), time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**inherited, "PYTHONUNBUFFERED": "1", **environment},
        start_new_session=True,
    )
    alarm = threading.Timer(timeout, os.killpg, (process.pid, 9))
    alarm.start()
    assert process.stdout is not None
    try:
        with open(log, "w", buffering=1, encoding="utf-8") as file:
            for line in process.stdout:
                seconds = time.monotonic() - begun
                file.write(f"{seconds:8.2f} {line}")
                if signs.ready and trace.ready is None and signs.ready.search(line):
                    trace.ready, trace.ready_cpu = seconds, cpu_seconds(process.pid)
                if signs.step.search(line):
                    trace.steps.append(seconds)
                    trace.cpu.append(cpu_seconds(process.pid))
                if found := LOSS.search(line):
                    trace.losses.append(float(found[1]))
        _, status, used = os.wait4(process.pid, 0)
    except BaseException:
        os.killpg(process.pid, 9)  # a bench that is stopped leaves nobody training
        raise
    finally:
        alarm.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    trace.seconds, trace.peak_bytes = time.monotonic() - begun, used.ru_maxrss * 1024
    if process.returncode or not trace.steps:
        said = log.read_text(errors="replace").splitlines()[-12:]
        raise Failed(f"exit code {process.returncode} after {trace.seconds:.0f} s:\n" + "\n".join(said))
    return trace
