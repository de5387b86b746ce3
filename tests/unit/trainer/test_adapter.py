"""The adapter's files: the same on every machine, plain LoRA whatever it started from, never empty or broken."""

import json
import math
from typing import Any

import pytest
import torch
import yaml

from finetune_operator.api.finetunestatus import EvaluationStatus
from finetune_trainer.failures import RunFailure
from finetune_trainer.results.adapter import portable_config, refuse_broken
from finetune_trainer.results.modelcard import model_card
from finetune_trainer.runspec import PrepareResult, RunSpec, Storage

from .tiny import finetune_spec


def a_run(**parts: Any) -> RunSpec:
    prepared = PrepareResult.model_validate(
        {
            "runId": "0123456789abcdef",
            "baseModel": {"digest": "sha256:" + "a" * 64, "revision": "abc123"},
            "dataset": {"digest": "sha256:" + "b" * 64, "samples": 24, "tokens": 400, "format": "Messages"},
        }
    )
    return RunSpec(
        stage="train", namespace="demo", name="tiny", job="tiny-1", spec=finetune_spec(**parts),
        storage=Storage(uri="s3://finetune"), prepared=prepared,
    )  # fmt: skip


def test_the_configuration_is_byte_stable_and_names_no_path() -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["v_proj", "q_proj", "k_proj"], init_lora_weights="pissa")
    config.base_model_name_or_path = "/work/model"
    made = portable_config(config.to_dict(), "meta-llama/Llama-3.1-8B", a_run())
    assert made["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert made["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"
    assert made["init_lora_weights"] is True
    assert "/work" not in json.dumps(made)


def test_an_adapter_that_is_still_zero_is_refused() -> None:
    weights = {"x.lora_A.weight": torch.randn(4, 10), "x.lora_B.weight": torch.zeros(12, 4)}
    with pytest.raises(RunFailure, match="still zero"):
        refuse_broken(weights, {})
    weights["x.lora_B.weight"][0, 0] = 1e-9
    refuse_broken(weights, {})


def test_an_adapter_that_is_not_finite_is_refused() -> None:
    with pytest.raises(RunFailure, match="not finite"):
        refuse_broken({"x.lora_B.weight": torch.tensor([1.0, float("nan")])}, {})


OBJECTIVES = {"SFT": "text-generation", "DPO": "text-generation", "Reward": "text-classification"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_model_card_has_metadata_that_a_hub_accepts(objective: str) -> None:
    run = a_run(
        baseModel={"huggingFace": {"repo": "meta-llama/Llama-3.1-8B"}, "s3": None},
        dataset={"train": {"huggingFace": {"repo": "acme/rows"}}, "evaluation": {"fraction": 0.1}},
        objective={"type": objective},
    )
    measured = {"loss": 1.0, "perplexity": math.inf, "hellaswag/acc_norm": 0.61}
    evaluation = EvaluationStatus(base={"loss": 2.0}, adapter=measured, passed=True)
    card = model_card(run, {"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, 1234, evaluation, "llama3.1")
    from huggingface_hub import ModelCard

    metadata = ModelCard(card, ignore_metadata_errors=False).data  # raises what the hub's own validation would
    assert metadata.base_model == "meta-llama/Llama-3.1-8B"
    assert metadata.library_name == "peft"
    assert metadata.pipeline_tag == OBJECTIVES[objective]
    assert metadata.datasets == ["acme/rows"]
    assert metadata.license == "llama3.1"
    assert metadata.model_name == run.name
    assert [
        (one.task_type, one.dataset_type, one.metric_type, one.metric_value) for one in metadata.eval_results or []
    ] == [(OBJECTIVES[objective], "acme/rows", "loss", 1.0), (OBJECTIVES[objective], "hellaswag", "acc_norm", 0.61)]
    assert "| loss | 2.0000 | 1.0000 |" in card


def test_the_card_of_a_base_model_that_is_on_no_hub_claims_no_repository() -> None:
    card = model_card(a_run(), {"base_model_name_or_path": "s3://models/tiny"}, 1234, EvaluationStatus())
    assert "base_model" not in yaml.safe_load(card.split("---")[1])


def test_the_card_names_a_revision_only_where_there_is_one() -> None:
    run = a_run()
    assert run.prepared
    without = run.prepared.base_model.model_copy(update={"revision": ""})
    bare = run.model_copy(update={"prepared": run.prepared.model_copy(update={"base_model": without})})
    config = {"base_model_name_or_path": "s3://models/tiny"}
    assert "| Base model | s3://models/tiny at abc123 |" in model_card(run, config, 1, EvaluationStatus())
    assert "| Base model | s3://models/tiny |" in model_card(bare, config, 1, EvaluationStatus())
