"""Every objective as two processes: what one would have done, with dropout and NEFTune, and how both end."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.training.checkpoint import Snapshot
from tests.unit.trainer.pods import Pods

from .small_run import CPU, Setup
from .tiny import finetune_spec

pytestmark = pytest.mark.timeout(120)
HERE = "tests.unit.trainer.test_objectives_two"

# Eight of six rows a step, two at once: four micro batches, and every step takes rows of the next epoch.
TRAINING = {"batchSize": 8, "learningRate": 0.02, "precision": "FP32", "neftuneAlpha": 5}
DROPOUT = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8}}  # 0.05 by default


def setup(
    kind: str,
    model: str,
    folder: Path,
    rank: int,
    size: int,
    method: Any = DROPOUT,
    shared: bool = False,
    rows: tuple[int, int] | None = None,
    **training: Any,
) -> Setup:
    from finetune_trainer.training.distributed import World

    spec = finetune_spec(objective={"type": kind}, method=method, training=TRAINING | training, checkpoint={"every": 1})
    return Setup(folder, Path(model), spec, micro_batch=2, world=World(rank, size), shared=shared, counts=rows)


def trained(kind: str, model: str, folder: Path, rank: int = 0, size: int = 1, shared: bool = False) -> dict[str, Any]:
    """Four steps; losses, gradients and what is measured of five held-out rows."""
    run = setup(kind, model, folder, rank, size, shared=shared)
    losses = run.run(4)
    norms = [line["gradNorm"] for line in run.fit.state.metrics]
    return {"losses": losses, "norms": norms, "measured": run.measure(run.held_out)}


def whole_and_shared(kind: str, model: str, folder: Path, rank: int, size: int) -> list[dict[str, Any]]:
    """With the base model in each of the processes, and with half of it in each."""
    return [trained(kind, model, folder / str(shared), rank, size, shared) for shared in (False, True)]


def uneven(kind: str, model: str, folder: Path, rank: int = 0, size: int = 1) -> list[float]:
    """Three rows a process as 2 and 1, where one process has 2, 2 and 2: the same losses, where nothing is random."""
    still = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8, "dropout": 0}}
    return setup(kind, model, folder, rank, size, method=still, batchSize=6, neftuneAlpha=None).run(3)


def stopped(kind: str, model: str, folder: Path, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """A rate that soon does harm, until early stopping sees it."""
    run = setup(kind, model, folder, rank, size, learningRate=0.1, earlyStopping={"patience": 1})
    saved: list[int] = []

    def save(snapshot: Snapshot) -> None:
        saved.append(snapshot.state.step)

    def measure() -> float:
        return run.measure(run.held_out)["loss"]

    assert run.fit.run(save, lambda: None, lambda: False, measure)
    state = run.fit.state
    return {"step": state.step, "best": state.best_step, "lowest": state.best_loss, "left": measure(), "saved": saved}


def spoilt(kind: str, model: str, folder: Path, rank: int, size: int) -> None:
    """The second process has references that are no numbers."""
    run = setup(kind, model, folder, rank, size)
    if rank == 1:
        run.reference["train"].fill_(float("nan"))
    run.run(1)


def few(kind: str, model: str, folder: Path, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Six rows a step out of four, and less to evaluate than there are processes."""
    still = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8, "dropout": 0}}
    run = setup(kind, model, folder, rank, size, method=still, batchSize=6, neftuneAlpha=None, rows=(4, 2))
    return {"losses": run.run(2), "measured": run.measure(run.held_out)}


def process(body: str, kind: str, model: str, folder: str, size: int = 2) -> int:
    """One of them; leaves what `body` gives, or why it failed."""
    from finetune_trainer.failures import RunFailure
    from finetune_trainer.training import peers
    from finetune_trainer.training.distributed import World

    peers.VERDICT_SECONDS, peers.LEAVE_SECONDS = 0.5, 0.5
    rank, result = int(os.environ["JOB_COMPLETION_INDEX"]), Path(os.environ["TERMINATION_LOG"])
    try:
        with peers.joined(World(rank, size), CPU, lambda failure: os._exit(3)):
            found = BODIES[body](kind, model, Path(folder) / f"rank-{rank}", rank, size)
    except RunFailure as failure:
        result.write_text(json.dumps([failure.reason, failure.message]))
        return 1
    result.write_text(json.dumps(found))
    return 0


def results(pods: Pods) -> list[Any]:
    return [json.loads(pods.result(index).read_text()) for index in range(len(pods.processes))]


@pytest.mark.parametrize("kind", ["DPO", "KTO", "ORPO", "Reward"])
def test_two_processes_have_the_losses_of_one_with_all_or_half_of_the_base_model(
    kind: str, tmp_path: Path, tiny_llama: Path
) -> None:
    with Pods(
        2, tmp_path / "pods", f"{HERE}:process", "whole_and_shared", kind, str(tiny_llama), str(tmp_path)
    ) as pods:
        one = trained(kind, str(tiny_llama), tmp_path / "one")
        assert pods.wait() == [0, 0], pods.logs()
    (first, shared), second = results(pods)
    assert [first, shared] == second and first == shared
    assert first["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert first["norms"] == pytest.approx(one["norms"], rel=1e-3)
    assert first["measured"] == pytest.approx(one["measured"], abs=1e-3)


def test_micro_batches_that_do_not_come_out_even_change_no_loss(tmp_path: Path, tiny_llama: Path) -> None:
    with Pods(2, tmp_path / "pods", f"{HERE}:process", "uneven", "KTO", str(tiny_llama), str(tmp_path)) as pods:
        one = uneven("KTO", str(tiny_llama), tmp_path / "one")
        assert pods.wait() == [0, 0], pods.logs()
    assert results(pods) == [pytest.approx(one, abs=1e-4)] * 2


@pytest.mark.parametrize("kind", ["SFT", "KTO"])
def test_three_processes_with_fewer_rows_than_they_are_have_the_losses_of_one(
    kind: str, tmp_path: Path, tiny_llama: Path
) -> None:
    with Pods(3, tmp_path / "pods", f"{HERE}:process", "few", kind, str(tiny_llama), str(tmp_path), 3) as pods:
        one = few(kind, str(tiny_llama), tmp_path / "one")
        assert pods.wait() == [0, 0, 0], pods.logs()
    first, *others = results(pods)
    assert others == [first, first]
    assert first["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert first["measured"] == pytest.approx(one["measured"], abs=1e-3)


def test_two_processes_stop_early_at_the_same_step_with_the_same_best_weights(tmp_path: Path, tiny_llama: Path) -> None:
    with Pods(2, tmp_path / "pods", f"{HERE}:process", "stopped", "DPO", str(tiny_llama), str(tmp_path)) as pods:
        one = stopped("DPO", str(tiny_llama), tmp_path / "one")
        assert pods.wait() == [0, 0], pods.logs()
    first, second = results(pods)
    assert first["step"] == second["step"] == one["step"] < 8
    assert first["best"] == second["best"] == one["best"] < one["step"]
    assert first["left"] == second["left"] == first["lowest"] == pytest.approx(one["lowest"], abs=1e-3)
    assert (first["saved"], second["saved"]) == (one["saved"], [])


def test_a_loss_that_is_not_finite_in_one_process_is_the_reason_of_both(tmp_path: Path, tiny_llama: Path) -> None:
    with Pods(2, tmp_path / "pods", f"{HERE}:process", "spoilt", "DPO", str(tiny_llama), str(tmp_path)) as pods:
        assert pods.wait() == [1, 1], pods.logs()
    first, second = results(pods)
    assert first == second
    assert first[0] == "NonFiniteLoss" and "step 1" in first[1]


BODIES = {"whole_and_shared": whole_and_shared, "uneven": uneven, "few": few, "stopped": stopped, "spoilt": spoilt}
