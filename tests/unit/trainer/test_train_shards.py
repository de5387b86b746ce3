"""The train stage as two processes that share the base model, because prepare's verdict says so."""

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.memory.architecture import architecture, read_config
from finetune_trainer.memory.estimate import Workload, estimate
from finetune_trainer.memory.verdict import estimate_run

from .bucket import RUN, Bench
from .test_train_two import result, two
from .tiny import finetune_spec, make_judged, make_llama, make_pairs, make_rows, write_dataset

pytestmark = pytest.mark.timeout(600)  # seconds on a quiet machine

ROW_TOKENS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks enough that half of them take less than all, with one of them gathered."""
    return make_llama(tmp_path_factory.mktemp("llama"), layers=6)


@pytest.fixture
def bench(endpoint: str, model: Path, tmp_path: Path) -> Bench:
    # Of five rows by two one process has two micro batches, the other one.
    dataset = write_dataset(tmp_path / "data", make_rows(24), make_rows(5, seed=1))
    return Bench(endpoint, model, dataset, tmp_path / "work", evaluation=5)


def too_large(spec: Any, model: Path) -> Any:
    """The same FineTune on two GPUs, each with room for half of the model but not for all of it."""
    shape = architecture(read_config(model))
    assert shape
    whole, half = (
        estimate(shape, Workload(spec, ROW_TOKENS, shards=shards), 1, checkpointing=True).expected for shards in (1, 2)
    )
    assert half < whole
    resources = {"gpus": 1, "nodes": 2, "gpuMemory": str(int(whole + half) // 2)}
    return type(spec).model_validate({**spec.model_dump(by_alias=True, exclude_none=True), "resources": resources})


def shared_out(bench: Bench, spec: Any, model: Path) -> Any:
    """The FineTune that is `too_large`, prepared: the verdict is that two GPUs share it."""
    shared = too_large(spec, model)
    verdict = estimate_run(model, shared, 0, ROW_TOKENS)
    assert (verdict.verdict, verdict.shards) == ("Fits", 2)
    assert "the base model shared out over 2 GPUs" in verdict.message
    bench.prepared = bench.prepared.model_copy(update={"estimate": verdict})
    return shared


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_a_model_that_does_not_fit_is_trained_in_two_parts_with_the_same_losses(
    bench: Bench, model: Path, method: str, tmp_path: Path
) -> None:
    spec = finetune_spec(
        method={"type": method},
        training={"batchSize": 8, "maxSteps": 4, "neftuneAlpha": 5, "earlyStopping": {"patience": 3}},
        checkpoint={"every": 2, "keep": 9},
        evaluation={"samples": ["alpha beta"]},
    )
    # test_train_two.py holds this to what one process computes.
    with two(bench, spec, tmp_path / "two", micro_batch=2) as pods:
        whole = result(pods)
    losses = bench.losses()
    bench.store.delete(RUN)

    shared = shared_out(bench, spec, model)
    with two(bench, shared, tmp_path / "shared", micro_batch=2, pretend_gpu=True) as pods:
        halves = result(pods)
        assert "base model: shared out over 2 processes" in pods.log(0).read_text()
        assert "base model: shared out over 2 processes" in pods.log(1).read_text()
    assert bench.losses() == losses
    assert halves["evaluation"] == whole["evaluation"]
    assert halves["adapter"]["digest"] == whole["adapter"]["digest"]
    assert bench.steps() == [2, 4]
    assert "shared out over 2 processes" in bench.store.get_bytes(f"{RUN}/report.html").decode()

    bench.store.delete(f"{RUN}/result.json")
    bench.store.delete(f"{RUN}/checkpoints/step-4")
    with two(bench, shared, tmp_path / "again", one_node=True, micro_batch=2, pretend_gpu=True) as pods:
        resumed = result(pods)
    assert resumed["resumedFromStep"] == 2
    assert bench.losses() == losses
    assert resumed["adapter"]["digest"] == halves["adapter"]["digest"]


@pytest.mark.parametrize("objective", ["KTO", "Reward"])
def test_other_objectives_learn_the_same_from_two_parts(
    endpoint: str, model: Path, objective: str, tmp_path: Path
) -> None:
    make = make_judged if objective == "KTO" else make_pairs
    dataset = write_dataset(tmp_path / "data", make(24), make(5, seed=1))
    bench = Bench(endpoint, model, dataset, tmp_path / "work", evaluation=5)
    spec = finetune_spec(
        method={"type": "QLoRA"}, objective={"type": objective}, training={"batchSize": 8, "maxSteps": 2}
    )
    with two(bench, spec, tmp_path / "two", micro_batch=2) as pods:
        whole = result(pods)
    losses = bench.losses()
    bench.store.delete(RUN)
    shared = shared_out(bench, spec, model)
    with two(bench, shared, tmp_path / "shared", micro_batch=2, pretend_gpu=True) as pods:
        halves = result(pods)
        assert "base model: shared out over 2 processes" in pods.log(1).read_text()
    assert bench.losses() == losses
    assert halves["evaluation"] == whole["evaluation"]
