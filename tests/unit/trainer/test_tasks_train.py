"""Tasks asked at the end of a training: in status, tasks.json, page and card; by two processes as by one."""

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.outcome import finished_result
from finetune_trainer.runspec import TrainResult
from finetune_trainer.tasks import catalogue
from finetune_trainer.tasks.fetch import leave_tasks

from .test_tasks import DATA
from .test_train import RUN, Bench
from .test_train_two import result, two
from .tiny import finetune_spec, make_rows, write_dataset

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


@pytest.fixture
def bench(endpoint: str, tiny_llama: Path, tmp_path: Path) -> Bench:
    bench = Bench(endpoint, tiny_llama, write_dataset(tmp_path / "data", make_rows(8)), tmp_path / "work")
    manager = catalogue.tasks_in(["arc", "gsm8k"])
    asked = finetune_spec(evaluation=ASKED).evaluation
    status = leave_tasks(asked, manager, lambda config: DATA[config.dataset_path], bench.store, tmp_path / "tasks")
    dataset = bench.prepared.dataset.model_copy(update={"tasks": status})
    bench.prepared = bench.prepared.model_copy(update={"dataset": dataset})
    return bench


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
