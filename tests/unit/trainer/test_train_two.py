"""The train stage as two processes: what one process would have done, sooner."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.pods import Pods

from .bucket import RUN, Bench
from .tiny import finetune_spec, make_rows, write_dataset

pytestmark = pytest.mark.timeout(300)

# Sums in another order: float32 sums of one step differ in the last bits, and Adam carries that on.
TOLERANCE = 2e-4


@pytest.fixture
def bench(endpoint: str, tiny_llama: Path, tmp_path: Path) -> Bench:
    dataset = write_dataset(tmp_path / "data", make_rows(25), make_rows(7, seed=1))
    return Bench(endpoint, tiny_llama, dataset, tmp_path / "work", evaluation=7)


def run_stage(spec_path: str) -> int:
    from finetune_trainer import stage
    from finetune_trainer.training import peers

    peers.VERDICT_SECONDS, peers.LEAVE_SECONDS = 0.5, 0.5
    return stage.run_stage("train", spec_path)


def two(bench: Bench, spec: Any, folder: Path, one_node: bool = False, **fields: Any) -> Pods:
    """The same FineTune with resources.nodes: 2."""
    asked = spec.model_copy(update={"resources": spec.resources.model_copy(update={"nodes": 2})})
    folder.mkdir()
    file = folder / "spec.json"
    file.write_text(bench.run_spec(asked, **fields).model_dump_json(by_alias=True, exclude_none=True))
    return Pods(2, folder, "tests.unit.trainer.test_train_two:run_stage", str(file), one_node=one_node)


def result(pods: Pods) -> dict[str, Any]:
    """The first pod's Result; the second has none when all went well."""
    assert pods.wait() == [0, 0], pods.logs()
    assert not pods.result(1).exists()
    told: dict[str, Any] = json.loads(pods.result(0).read_text())
    return told["trained"]  # type: ignore[no-any-return]


def forget_after_step_2(bench: Bench) -> None:
    bench.store.delete(f"{RUN}/result.json")
    for step in (4, 5):
        bench.store.delete(f"{RUN}/checkpoints/step-{step}")


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_two_processes_have_the_losses_of_one_resume_bitwise_and_can_be_followed_by_one(
    bench: Bench, method: str, tmp_path: Path
) -> None:
    # Eight packed rows a step, at most two at once: two micro batches a process. 25 rows, so epochs end within steps.
    spec = finetune_spec(
        method={"type": method},
        training={"batchSize": 8, "maxSteps": 5, "neftuneAlpha": 5},
        checkpoint={"every": 2, "keep": 9},
    )
    one = bench.train(spec, micro_batch=2)
    losses_of_one = bench.losses()
    bench.store.delete(RUN)

    with two(bench, spec, tmp_path / "two", micro_batch=2) as pods:
        whole = result(pods)
    losses = bench.losses()
    assert losses == pytest.approx(losses_of_one, abs=TOLERANCE)
    assert whole["evaluation"]["base"] == pytest.approx(one.evaluation.base, abs=TOLERANCE)
    assert whole["evaluation"]["adapter"] == pytest.approx(one.evaluation.adapter, abs=0.02)
    assert bench.steps() == [2, 4, 5]

    forget_after_step_2(bench)
    # Where the processes are makes no difference: these share a disk.
    with two(bench, spec, tmp_path / "again", one_node=True, micro_batch=2) as pods:
        resumed = result(pods)
    assert resumed["resumedFromStep"] == 2
    assert bench.losses() == losses
    assert resumed["adapter"]["digest"] == whole["adapter"]["digest"]

    forget_after_step_2(bench)
    # Other `resources` are no other run.
    assert bench.train(spec, micro_batch=2).resumed_from_step == 2
    assert bench.losses()[:2] == losses[:2]
    assert bench.losses() == pytest.approx(losses_of_one, abs=TOLERANCE)


def test_sigterm_in_one_pod_stops_both_at_the_same_step_with_one_checkpoint(bench: Bench, tmp_path: Path) -> None:
    spec = finetune_spec(training={"maxSteps": 400}, checkpoint={"every": 1000})
    with two(bench, spec, tmp_path / "two") as pods:
        pods.wait_for_line(0, "first step")
        os.kill(pods.processes[1].pid or 0, signal.SIGTERM)
        assert pods.wait() == [143, 143], pods.logs()
        assert not pods.result(0).exists() and not pods.result(1).exists()
    (step,) = bench.steps()
    assert len(bench.losses()) == step < 400


def test_a_pod_killed_while_it_trains_ends_the_other_as_lost(bench: Bench, tmp_path: Path) -> None:
    spec = finetune_spec(training={"maxSteps": 400}, checkpoint={"every": 1000})
    with two(bench, spec, tmp_path / "two") as pods:
        pods.wait_for_line(0, "first step")
        pods.processes[1].kill()
        assert pods.wait() == [1, -signal.SIGKILL], pods.logs()
        assert json.loads(pods.result(0).read_text())["failure"]["reason"] == "PeerLost"
