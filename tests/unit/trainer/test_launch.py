"""The processes of one node: how they are numbered, and how their ends become one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_trainer.failures import RunFailure
from finetune_trainer.launch import Ended, conclude, places, processes_per_node, run_node
from finetune_trainer.runspec import Failure, PrepareResult, Result, RunSpec, Storage

from .tiny import finetune_spec


def run_spec(gpus: int = 0, nodes: int = 1, pretend: bool = False) -> RunSpec:
    spec = finetune_spec(resources={"gpus": gpus, "nodes": nodes}, training={"batchSize": 16})
    storage = Storage(uri="s3://finetune")
    return RunSpec(
        stage="train", namespace="demo", name="bot", job="bot-1", spec=spec, storage=storage, pretend_gpu=pretend
    )


def test_one_process_is_not_numbered() -> None:
    assert places(run_spec(), {}) == places(run_spec(gpus=1), {}) == []


def test_a_node_has_a_process_per_gpu_and_numbers_go_on_from_node_to_node() -> None:
    pod = {"JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "bot-1-0.ft-bot-1"}
    seats = places(run_spec(gpus=4, nodes=2), pod)
    assert [(s["RANK"], s["LOCAL_RANK"], s["WORLD_SIZE"]) for s in seats] == [
        ("4", "0", "8"), ("5", "1", "8"), ("6", "2", "8"), ("7", "3", "8"),
    ]  # fmt: skip
    assert {(s["MASTER_ADDR"], s["MASTER_PORT"]) for s in seats} == {("bot-1-0.ft-bot-1", "29500")}


def test_cpus_and_pretended_gpus_have_one_process_per_node() -> None:
    assert [processes_per_node(run_spec(gpus, pretend=gpus > 0)) for gpus in (0, 8)] == [1, 1]


def test_processes_that_torchrun_started_are_taken_as_they_are() -> None:
    assert places(run_spec(gpus=2), {"RANK": "1", "WORLD_SIZE": "2"}) == []


def test_nodes_that_do_not_know_each_other_are_refused_by_name() -> None:
    with pytest.raises(RunFailure, match="MASTER_ADDR"):
        places(run_spec(nodes=2), {})


def failure(rank: int, reason: str) -> Ended:
    return Ended(rank, 1, Result(stage="train", job="bot-1", failure=Failure(reason=reason, message=f"of {rank}")))


def prepared() -> Result:
    return Result(stage="train", job="bot-1", prepared=PrepareResult(run_id="ab", base_model={}, dataset={}))


def test_the_node_reports_what_its_first_process_does() -> None:
    done = prepared()
    assert conclude(run_spec(), [Ended(1, 0, None), Ended(0, 0, done)]) == (0, done)
    assert conclude(run_spec(), [Ended(3, 0, None), Ended(2, 0, None)]) == (0, None)


def test_an_interrupted_node_has_failed_of_nothing() -> None:
    assert conclude(run_spec(), [Ended(0, 143, None), Ended(1, 143, None)]) == (143, None)


def test_a_process_that_missed_another_says_less_than_that_one() -> None:
    code, result = conclude(run_spec(), [failure(0, "PeerLost"), failure(1, "CUDAOutOfMemory")])
    assert code == 1 and result is not None and result.failure is not None
    assert (result.failure.reason, result.failure.message) == ("CUDAOutOfMemory", "of 1")


def test_a_killed_process_is_named_with_its_signal() -> None:
    code, result = conclude(run_spec(), [Ended(1, -9, None), failure(0, "PeerLost")])
    assert code == 1 and result is not None and result.failure is not None
    assert (result.failure.reason, result.failure.message) == (
        "PeerLost",
        "process 1 was killed by SIGKILL and left no result",
    )


PLAYS = {
    "result": "import os, pathlib; pathlib.Path(os.environ['TERMINATION_LOG']).write_text(os.environ['PLAY']) "
    "if os.environ['RANK'] == '0' else None",
    "killed": "import os, signal, time; os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' "
    "else time.sleep(60)",
    "sigterm": "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
    "os.write(1, b'ready\\n'); time.sleep(60)",
}


def test_the_first_processs_result_becomes_the_pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAY", prepared().wire().decode())
    run, log = run_spec(gpus=2), tmp_path / "termination"
    assert run_node(run, [sys.executable, "-c", PLAYS["result"]], places(run, {}), log) == 0
    assert Result.model_validate_json(log.read_bytes()) == prepared()


def test_a_process_that_stays_after_another_was_killed_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.launch.PATIENCE", 0.2)
    run, log = run_spec(gpus=2), tmp_path / "termination"
    assert run_node(run, [sys.executable, "-c", PLAYS["killed"]], places(run, {}), log) == 1
    told = Result.model_validate_json(log.read_bytes()).failure
    assert told is not None and "process 1 was killed by SIGKILL" in told.message


def test_sigterm_reaches_all_processes_and_the_node_ends_as_interrupted(tmp_path: Path) -> None:
    node = (
        "import sys; from pathlib import Path; from tests.unit.trainer.test_launch import *; run = run_spec(gpus=2); "
        f"sys.exit(run_node(run, [sys.executable, '-c', PLAYS['sigterm']], places(run, {{}}), Path({str(tmp_path / 'log')!r})))"
    )
    started = subprocess.Popen([sys.executable, "-c", node], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert started.stdout is not None
    assert [started.stdout.readline().strip() for _ in range(2)] == ["ready", "ready"]
    started.send_signal(signal.SIGTERM)
    assert started.wait(120) == 143
    assert not (tmp_path / "log").exists()
