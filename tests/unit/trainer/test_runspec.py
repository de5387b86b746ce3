"""The contract with the operator: what starts another run, and a Result that always fits the termination message."""

import json
import subprocess
import sys
from typing import Any

import pytest

from finetune_trainer.runspec import MAX_RESULT_BYTES, Result, RunSpec, Storage, TrainResult, inputs_hash, run_id

from .tiny import finetune_spec

BASE, DATA, IMAGE = "sha256:aa", "sha256:bb", "trainer:1"


def test_the_run_spec_survives_its_journey_through_an_annotation() -> None:
    spec = RunSpec(
        stage="prepare",
        namespace="demo",
        name="bot",
        job="bot-prepare",
        spec=finetune_spec(),
        storage=Storage(uri="s3://finetune"),
    )
    wire = spec.model_dump_json(by_alias=True)
    assert RunSpec.model_validate_json(wire) == spec
    assert "reportUrl" in json.loads(wire)


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"lora": {"rank": 8}}},
        {"training": {"learningRate": 0.1}},
        {"training": {"seed": 1}},
        {"objective": {"type": "DPO"}},
    ],
    ids=str,
)
def test_what_is_trained_changes_both_hashes(change: dict[str, Any]) -> None:
    old, new = finetune_spec(), finetune_spec(**change)
    assert inputs_hash(new, IMAGE) != inputs_hash(old, IMAGE)
    assert run_id(BASE, DATA, new, IMAGE) != run_id(BASE, DATA, old, IMAGE)


@pytest.mark.parametrize(
    "change",
    [
        {"retry": {"infrastructure": 1}},
        {"suspend": True},
        {"ttlAfterFinished": "1h"},
        {"queueName": "gpus"},
        {"resources": {"cpu": "4"}},
        {"podTemplate": {"labels": {"team": "a"}}},
        {"checkpoint": {"every": "1m"}},
        {"training": {"microBatchSize": 1}},
        {"output": {"exports": ["Merged"]}},
        {"tracking": {"mlflow": {"uri": "http://mlflow.mlops:5000"}}},
    ],
    ids=str,
)
def test_what_is_not_trained_changes_neither(change: dict[str, Any]) -> None:
    old, new = finetune_spec(), finetune_spec(**change)
    assert inputs_hash(new, IMAGE) == inputs_hash(old, IMAGE)
    assert run_id(BASE, DATA, new, IMAGE) == run_id(BASE, DATA, old, IMAGE)


def test_where_data_comes_from_changes_the_inputs_but_not_the_run() -> None:
    old = finetune_spec()
    new = finetune_spec(dataset={"train": {"s3": {"uri": "s3://elsewhere/train.jsonl"}}})
    assert inputs_hash(new, IMAGE) != inputs_hash(old, IMAGE)
    assert run_id(BASE, DATA, new, IMAGE) == run_id(BASE, DATA, old, IMAGE)


def test_gates_change_the_inputs_but_not_the_run() -> None:
    old, new = finetune_spec(), finetune_spec(evaluation={"gates": [{"metric": "loss", "max": 1}]})
    assert inputs_hash(new, IMAGE) != inputs_hash(old, IMAGE)
    assert run_id(BASE, DATA, new, IMAGE) == run_id(BASE, DATA, old, IMAGE)


def test_digests_and_image_name_the_run() -> None:
    spec = finetune_spec()
    ids = {
        run_id(*inputs)
        for inputs in (
            (BASE, DATA, spec, IMAGE),
            ("x", DATA, spec, IMAGE),
            (BASE, "x", spec, IMAGE),
            (BASE, DATA, spec, "x"),
        )
    }
    assert len(ids) == 4
    assert all(len(one) == 16 for one in ids)


def test_a_defaulted_field_is_the_same_as_its_default_written_out() -> None:
    assert inputs_hash(finetune_spec(), IMAGE) == inputs_hash(finetune_spec(objective={"type": "SFT"}), IMAGE)


def test_a_result_fits_the_termination_message_whatever_it_says() -> None:
    gates = [{"metric": f"task{n}/acc", "passed": False, "value": n / 3, "message": "x" * 500} for n in range(16)]
    adapter = {"digest": "sha256:" + "0" * 64, "uri": "s3://finetune/" + "a" * 200}
    tracking = [{"name": name, "url": "http://" + "t" * 580, "message": "y" * 500} for name in ("MLflow", "WandB")]
    trained = TrainResult.model_validate(
        {"adapter": adapter, "evaluation": {"gates": gates, "passed": False}, "steps": 3, "tracking": tracking}
    )
    full = Result(stage="train", job="j" * 63, run_id="0" * 16, trained=trained)
    failed = Result(stage="train", job="j", failure={"reason": "InvalidDataset", "message": "zeile\n" + "ä" * 9000})  # type: ignore[arg-type]
    for result in (failed, full):
        wire = result.wire()
        assert len(wire) <= MAX_RESULT_BYTES
        back = Result.model_validate_json(wire)
        assert (back.trained is None) == (result.trained is None)
        assert back.failure is None or back.failure.reason == "InvalidDataset"


def test_the_contract_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "minio", "transformers")
    code = f"import sys, finetune_trainer.runspec, finetune_trainer.command.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_many_metrics_are_cut_to_those_that_gates_ask_for() -> None:
    metrics = {f"task{number}/accuracy_normalised": number / 3 for number in range(60)}
    gates = [{"metric": "task7/accuracy_normalised", "passed": True, "value": 7 / 3}]
    evaluation = {"base": metrics, "adapter": metrics, "gates": gates, "passed": True}
    evaluation["lowerIsBetter"] = list(metrics)
    trained = TrainResult.model_validate({"adapter": {"digest": "sha256:00"}, "evaluation": evaluation})
    wire = Result(stage="train", job="j", trained=trained).wire()
    assert len(wire) <= MAX_RESULT_BYTES
    back = Result.model_validate_json(wire).trained
    assert back
    assert back.evaluation
    assert back.evaluation.adapter == {"task7/accuracy_normalised": 7 / 3}
    assert back.evaluation.lower_is_better == ["task7/accuracy_normalised"]
    assert back.evaluation.passed


def test_a_figure_that_is_no_number_is_left_out() -> None:
    evaluation = {"base": {"loss": float("nan"), "perplexity": float("inf")}, "adapter": {"loss": 1.0}}
    trained = TrainResult.model_validate({"adapter": {}, "evaluation": evaluation, "finalLoss": float("nan")})
    back = Result.model_validate_json(Result(stage="train", job="j", trained=trained).wire()).trained
    assert back
    assert back.evaluation
    assert (back.evaluation.base, back.evaluation.adapter, back.final_loss) == ({}, {"loss": 1.0}, None)
