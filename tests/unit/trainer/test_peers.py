"""Processes that end together: whatever becomes of one of them, all say the same, soon."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest

from finetune_trainer.failures import RunFailure
from tests.unit.trainer.pods import Pods

pytestmark = pytest.mark.timeout(120)
HERE = "tests.unit.trainer.test_peers"
TOGETHER = f"{HERE}:together"


def together(act: str, at: int) -> int:
    """A run whose process `at` does something at its third step; returns the exit code."""
    import torch

    from finetune_trainer.train import out_of_memory_is_told
    from finetune_trainer.training import peers
    from finetune_trainer.training.distributed import World, summed

    peers.WATCH_SECONDS, peers.GRACE_SECONDS = 0.2, 0.5
    if act == "stopped":  # a starved machine must not make others look silent
        peers.SILENT_SECONDS = 2.0
    peers.VERDICT_SECONDS, peers.LEAVE_SECONDS = 0.5, 0.5
    world, cpu = World(rank=int(os.environ["JOB_COMPLETION_INDEX"]), size=2), torch.device("cpu")

    def end(failure: RunFailure) -> None:
        told(failure)
        os._exit(1)

    def told(failure: RunFailure) -> None:
        Path(os.environ["TERMINATION_LOG"]).write_text(json.dumps([failure.reason, failure.message]))

    try:
        with peers.joined(world, cpu, end), out_of_memory_is_told():
            for step in range(5):
                if step == 3 and world.rank == at:
                    ACTS[act]()
                summed(world, 1.0, device=cpu)
    except RunFailure as failure:
        told(failure)
        return 1
    return 0


def out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def disk_full() -> None:
    raise OSError(28, "No space left on device")


def start(taken_out: float) -> None:
    import torch

    from finetune_trainer.training.distributed import World, share_start

    weights = torch.nn.Parameter(torch.full((3,), taken_out))
    rank = int(os.environ["JOB_COMPLETION_INDEX"])
    share_start(World(rank=rank, size=2), [weights], [torch.full((2,), taken_out)], torch.device("cpu"))
    assert weights.tolist() == [0.0, 0.0, 0.0]


def starts(differ: bool) -> int:
    """Both processes begin; the second one's own start may be another."""
    ACTS["start"] = lambda: start(float(differ and os.environ["JOB_COMPLETION_INDEX"] == "1"))
    return together("start", int(os.environ["JOB_COMPLETION_INDEX"]))


def plan() -> None:
    """The second process's GPU has less memory: room for fewer rows, computed twice."""
    import torch

    from finetune_trainer.memory.plan import as_all_can
    from finetune_trainer.training.distributed import World

    rank = int(os.environ["JOB_COMPLETION_INDEX"])
    own = [(8, False), (2, True)][rank]
    assert as_all_can(World(rank=rank, size=2), *own, torch.device("cpu")) == (2, True)


def plans() -> int:
    ACTS["plan"] = plan
    return together("plan", int(os.environ["JOB_COMPLETION_INDEX"]))


def late(log: str) -> int:
    """The first process starts when the other one waits for it already."""
    if os.environ["JOB_COMPLETION_INDEX"] == "0":
        while "all meet at" not in Path(log).read_text():
            os.sched_yield()
    logging.basicConfig(level=logging.INFO)
    return together("nothing", 0)


def bug() -> None:
    raise KeyError("batch")


ACTS = {
    "nothing": lambda: None,
    "out of memory": out_of_memory,
    "disk full": disk_full,
    "bug": bug,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def verdicts(pods: Pods) -> list[str]:
    files = [pods.result(index) for index in range(2)]
    return [json.loads(file.read_text())[0] for file in files if file.exists()]


def test_processes_that_all_come_to_the_end_leave_at_once(tmp_path: Path) -> None:
    with Pods(2, tmp_path, TOGETHER, "nothing", 0) as pods:
        assert pods.wait() == [0, 0], pods.logs()


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    ("act", "reason"),
    [("out of memory", "CUDAOutOfMemory"), ("disk full", "DiskFull"), ("bug", "InternalError")],
)
def test_what_one_process_fails_of_all_report(tmp_path: Path, act: str, reason: str, at: int) -> None:
    with Pods(2, tmp_path, TOGETHER, act, at) as pods:
        assert pods.wait() == [1, 1], pods.logs()
        assert verdicts(pods) == [reason, reason]


@pytest.mark.parametrize("at", [0, 1])
def test_a_killed_process_ends_the_others_as_lost(tmp_path: Path, at: int) -> None:
    with Pods(2, tmp_path, TOGETHER, "killed", at) as pods:
        codes = pods.wait()
        assert (codes[at], codes[1 - at]) == (-signal.SIGKILL, 1), pods.logs()
        assert verdicts(pods) == ["PeerLost"]


@pytest.mark.parametrize("at", [0, 1])
def test_a_process_that_goes_silent_ends_the_others_though_they_are_stuck(tmp_path: Path, at: int) -> None:
    with Pods(2, tmp_path, TOGETHER, "stopped", at) as pods:
        pods.processes[1 - at].join(60)
        assert pods.processes[1 - at].exitcode == 1, pods.logs()
        assert verdicts(pods) == ["PeerLost"]


def test_all_make_the_passes_that_the_smallest_gpu_can(tmp_path: Path) -> None:
    with Pods(2, tmp_path, f"{HERE}:plans") as pods:
        assert pods.wait() == [0, 0], pods.logs()


def test_a_first_pod_that_comes_last_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "log-1.txt").touch()
    with Pods(2, tmp_path, f"{HERE}:late", str(tmp_path / "log-1.txt")) as pods:
        assert pods.wait() == [0, 0], pods.logs()


def test_all_begin_with_the_first_ones_weights(tmp_path: Path) -> None:
    with Pods(2, tmp_path, f"{HERE}:starts", False) as pods:
        assert pods.wait() == [0, 0], pods.logs()


def test_base_weights_that_began_differently_are_not_trained_on(tmp_path: Path) -> None:
    with Pods(2, tmp_path, f"{HERE}:starts", True) as pods:
        assert pods.wait() == [1, 1], pods.logs()
        assert verdicts(pods) == ["UnsupportedCombination"] * 2


def test_a_pod_that_never_comes_is_said_with_what_to_check(tmp_path: Path) -> None:
    with Pods(1, tmp_path, f"{HERE}:alone") as pods:
        assert pods.wait() == [1], pods.logs()
        reason, message = json.loads(pods.result(0).read_text())
        assert reason == "PeerLost"
        assert "NetworkPolicy" in message


def alone() -> int:
    from finetune_trainer.training import peers

    peers.JOIN_SECONDS = 1.0
    return together("nothing", 0)
