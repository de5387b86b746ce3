"""The processes of one node: one per GPU, numbered as torchrun numbers them, ending as one.

torchrun itself would import torch before it starts anything, cut off a checkpoint's upload 30 s after SIGTERM, and
hide in its exit code that a run was interrupted. Processes that it has started are taken as they are.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from pydantic import ValidationError

from finetune_trainer.failures import PEER_LOST, WORLD_SIZE_MISMATCH, RunFailure
from finetune_trainer.runspec import RENDEZVOUS_PORT, Result, RunSpec

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that the others have to end by themselves once one has failed
DONE, FAILED, INTERRUPTED = 0, 1, 143

Place = dict[str, str]


def processes_per_node(run: RunSpec) -> int:
    """One per GPU; one where there is none, or only a pretended one."""
    return 1 if run.pretend_gpu else max(1, run.spec.resources.gpus)


def places(run: RunSpec, environment: Mapping[str, str]) -> list[Place]:
    """The variables of each process of this node; none when the run has one process, or they are set already.

    In a Job with an index its pod's number is the node's, and MASTER_ADDR names the first pod.
    """
    nodes, here = run.spec.resources.nodes, processes_per_node(run)
    if nodes * here == 1 or "RANK" in environment:
        return []
    if nodes > 1 and not {"JOB_COMPLETION_INDEX", "MASTER_ADDR"} <= environment.keys():
        raise RunFailure(
            WORLD_SIZE_MISMATCH,
            f"resources.nodes asks for {nodes} nodes, but JOB_COMPLETION_INDEX (which of them this is) and MASTER_ADDR "
            "(where the first one is) are not set; the operator's Jobs set both",
        )
    node = int(environment.get("JOB_COMPLETION_INDEX", "0"))
    shared = {
        "WORLD_SIZE": str(nodes * here),
        "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(RENDEZVOUS_PORT if nodes > 1 else _free_port()),
    }
    return [{**shared, "RANK": str(node * here + local), "LOCAL_RANK": str(local)} for local in range(here)]


def run_node(run: RunSpec, command: Sequence[str], seats: Sequence[Place], termination_log: Path) -> int:
    """Run the command once per place; leaves one Result for all and returns the exit code that belongs to it."""
    with TemporaryDirectory() as folder:
        results = [Path(folder) / place["RANK"] for place in seats]
        processes = [
            subprocess.Popen(command, env={**os.environ, **place, "TERMINATION_LOG": str(result)})
            for place, result in zip(seats, results, strict=True)
        ]
        ended = _wait(processes)
        left = [Ended(int(seats[i]["RANK"]), code, _read(results[i])) for i, code in ended]
    code, result = conclude(run, left)
    if result is not None:
        termination_log.write_bytes(result.wire())
    return code


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    rank: int
    code: int
    result: Result | None


def conclude(run: RunSpec, ended: Sequence[Ended]) -> tuple[int, Result | None]:
    """Exit code and Result of a node whose processes ended in this order.

    Those that only missed another one say less than the one that they missed.
    """
    if all(process.code == DONE for process in ended):
        return DONE, next((process.result for process in ended if process.result), None)
    failed = [process for process in ended if process.code not in (DONE, INTERRUPTED)]
    if not failed:
        return INTERRUPTED, None
    told = [process.result for process in failed if process.result and process.result.failure]
    causes = [result for result in told if result.failure and result.failure.reason != PEER_LOST]
    if causes:
        return FAILED, causes[0]
    silent = next((process for process in failed if process.result is None), None)
    if silent is not None:
        return FAILED, Result.failed(run, PEER_LOST, f"process {silent.rank} {_how(silent.code)} and left no result")
    return FAILED, told[0]


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """(index, exit code) in the order of their ends. SIGTERM goes on to all of them."""

    def forward(signum: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signum)

    signal.signal(signal.SIGTERM, forward)
    ends: queue.Queue[tuple[int, int]] = queue.Queue()
    for index, process in enumerate(processes):
        waiting = threading.Thread(target=lambda i=index, p=process: ends.put((i, p.wait())), daemon=True)
        waiting.start()
    ended: list[tuple[int, int]] = []
    while len(ended) < len(processes):
        one_failed = any(code != DONE for _, code in ended)
        try:
            ended.append(ends.get(timeout=PATIENCE if one_failed else None))
        except queue.Empty:
            for process in processes:
                process.kill()
    return ended


def _read(file: Path) -> Result | None:
    try:
        return Result.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_command(spec_path: str) -> list[str]:
    return [sys.executable, "-m", "finetune_trainer", "train", "--spec", spec_path]
