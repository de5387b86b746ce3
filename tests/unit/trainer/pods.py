"""Processes that play the pods of one run, forked from a server that has imported torch once."""

import multiprocessing
import os
import socket
import time
from collections.abc import Mapping
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.unit.trainer.preloaded"])


class Pods:
    """As many processes as the run has nodes, each with the variables that an indexed Job's pod has.

    `body` names the function that each runs, as module:name; it returns the exit code. `one_node`: they are processes
    of one pod, numbered as torchrun does, with one disk.
    """

    def __init__(self, count: int, folder: Path, body: str, *arguments: Any, one_node: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        self.processes: list[BaseProcess] = []
        for index in range(count):
            own = {
                "JOB_COMPLETION_INDEX": str(index),
                "FINETUNE_WORK": str(folder / f"work-{index}"),
                "TERMINATION_LOG": str(self.result(index)),
            }
            if one_node:
                own |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
                own["FINETUNE_WORK"] = str(folder / "work")
            process = _FORKS.Process(target=_pod, args=({**shared, **own}, self.log(index), body, arguments))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def result(self, index: int) -> Path:
        return self.folder / f"result-{index}.json"

    def log(self, index: int) -> Path:
        return self.folder / f"log-{index}.txt"

    def wait(self, seconds: float = 290) -> list[int | None]:
        """The exit codes; None of a process that does not end in time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_for_line(self, index: int, words: str, seconds: float = 290) -> None:
        deadline = time.monotonic() + seconds
        while words not in (self.log(index).read_text() if self.log(index).exists() else ""):
            assert self.processes[index].is_alive() and time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def logs(self) -> str:
        files = sorted(self.folder.glob("log-*.txt"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pod(environment: Mapping[str, str], log: Path, body: str, arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    module, _, name = body.partition(":")
    os._exit(getattr(import_module(module), name)(*arguments))
