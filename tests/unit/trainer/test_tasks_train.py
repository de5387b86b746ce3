"""Tasks asked at the end of a training: in status, tasks.json, page and card; by two processes as by one."""

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.evaluation.tasks import catalogue
from finetune_trainer.evaluation.tasks.fetch import leave_tasks
from finetune_trainer.memory.verdict import estimate_run
from finetune_trainer.results.outcome import finished_result
from finetune_trainer.runspec import TrainResult

from .bucket import RUN, Bench
from .test_tasks import DATA
from .test_train_shards import ROW_TOKENS, too_large
from .test_train_two import result, two
from .tiny import finetune_spec, make_llama, make_rows, write_dataset

pytestmark = pytest.mark.timeout(300)

ASKED: dict[str, Any] = {
    "tasks": [{"name": "arc_easy", "fewShot": 1}, {"name": "gsm8k", "fewShot": 1, "limit": 1}],
    "gates": [
        {"metric": "arc_easy/acc_norm", "min": 0.0},
        {"metric": "gsm8k/exact_match,strict-match", "betterThanBase": True},
    ],
}
METRICS = {
    "arc_easy/acc", "arc_easy/acc_norm", "gsm8k/exact_match,strict-match", "gsm8k/exact_match,flexible-extract",
}  # fmt: skip


def asking(asked: dict[str, Any], endpoint: str, model: Path, folder: Path) -> Bench:
    bench = Bench(endpoint, model, write_dataset(folder / "data", make_rows(8)), folder / "work")
    manager, evaluation = catalogue.tasks_in(["arc", "gsm8k"]), finetune_spec(evaluation=asked).evaluation
    status = leave_tasks(evaluation, manager, lambda config: DATA[config.dataset_path], bench.store, folder / "tasks")
    dataset = bench.prepared.dataset.model_copy(update={"tasks": status})
    bench.prepared = bench.prepared.model_copy(update={"dataset": dataset})
    return bench


@pytest.fixture
def bench(endpoint: str, tiny_llama: Path, tmp_path: Path) -> Bench:
    return asking(ASKED, endpoint, tiny_llama, tmp_path)


def test_base_and_adapter_answer_tasks_and_gates_judge_them(bench: Bench, tmp_path: Path) -> None:
    spec = finetune_spec(evaluation=ASKED, training={"maxSteps": 2})
    found = bench.train(spec)
    evaluation = found.evaluation
    assert set(evaluation.adapter) == set(evaluation.base) == METRICS
    assert [gate.passed for gate in evaluation.gates] == [True, False]
    assert evaluation.gates[1].message == "gsm8k/exact_match,strict-match 0 <= 0 of the base model"
    told = bench.store.get_json(f"{RUN}/tasks.json")
    questions = {one["metric"]: one["questions"] for one in told["metrics"]}
    assert (questions["arc_easy/acc"], questions["gsm8k/exact_match,strict-match"]) == (9, 1)
    page = bench.store.get_bytes(f"{RUN}/report.html").decode()
    assert "Tasks of the lm-evaluation-harness" in page and "On held-out rows" not in page
    card = bench.store.at(found.adapter.uri).get_bytes("README.md").decode()
    assert f"| arc_easy/acc | {evaluation.base['arc_easy/acc']:.4f} |" in card

    run = bench.run_spec(spec)
    assert finished_result(bench.store, run) == found
    other = bench.prepared.dataset.tasks.model_copy(update={"digest": "sha256:other"})  # type: ignore[union-attr]
    changed = bench.prepared.dataset.model_copy(update={"tasks": other})
    bench.prepared = bench.prepared.model_copy(update={"dataset": changed})
    assert finished_result(bench.store, bench.run_spec(spec)) is None

    bench.prepared = run.prepared  # type: ignore[assignment]
    bench.store.delete(f"{RUN}/result.json")
    with two(bench, spec, tmp_path / "two") as pods:
        shared = TrainResult.model_validate(result(pods)).evaluation
    assert shared and shared.base == pytest.approx(evaluation.base)
    assert shared.adapter == pytest.approx(evaluation.adapter)


def test_a_base_model_shared_out_over_processes_is_asked_by_the_first_one(endpoint: str, tmp_path: Path) -> None:
    asked = {"tasks": [{"name": "arc_easy"}]}
    model = make_llama(tmp_path / "llama", layers=6)
    bench = asking(asked, endpoint, model, tmp_path)
    spec = finetune_spec(evaluation=asked, training={"batchSize": 8, "maxSteps": 1})
    whole = bench.train(spec, micro_batch=2).evaluation
    bench.store.delete(RUN)
    shared = too_large(spec, model)
    bench.prepared = bench.prepared.model_copy(update={"estimate": estimate_run(model, shared, 0, ROW_TOKENS)})
    with two(bench, shared, tmp_path / "shared", micro_batch=2, pretend_gpu=True) as pods:
        halves = TrainResult.model_validate(result(pods)).evaluation
    assert "shared out over 2 processes" in pods.logs()
    assert halves and halves.base == pytest.approx(whole.base)
