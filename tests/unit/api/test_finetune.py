"""What the types make of a FineTune: defaults, forms that are accepted, and the three published recipes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finetune_operator.api import FineTune
from finetune_operator.api.common import seconds

RECIPES = Path(__file__).resolve().parents[3] / "examples" / "recipes"


def finetune(**spec: Any) -> FineTune:
    minimal = {
        "baseModel": {"s3": {"uri": "s3://models/tiny-llama"}},
        "dataset": {"train": {"s3": {"uri": "s3://datasets/support-bot/train.jsonl"}}},
    }
    return FineTune.model_validate({"metadata": {"name": "support-bot"}, "spec": minimal | spec})


def test_a_minimal_finetune_is_qlora_of_rank_16_for_three_epochs() -> None:
    spec = finetune().spec
    assert (spec.method.type, spec.method.quantization.type, spec.method.quantization.double_quant) == (
        "QLoRA",
        "NF4",
        True,
    )
    assert (spec.method.lora.rank, spec.method.lora.alpha, spec.method.lora.target_modules) == (16, 32, ["all-linear"])
    assert (spec.training.epochs, spec.training.max_steps) == (3, None)
    assert (spec.training.micro_batch_size, spec.checkpoint.every, spec.checkpoint.keep) == ("auto", "10m", 2)
    assert (spec.retry.infrastructure, spec.retry.out_of_memory) == (6, 3)


@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA", "IA3", "PrefixTuning", "PromptTuning", "PTuning"])
def test_only_qlora_quantizes_by_default(method: str) -> None:
    assert finetune(method={"type": method}).spec.method.quantization.type == "None"


def test_a_quantization_that_is_given_is_kept() -> None:
    method = {"type": "LoRA", "quantization": {"type": "INT8"}}
    assert finetune(method=method).spec.method.quantization.type == "INT8"


def test_max_steps_stand_instead_of_epochs() -> None:
    training = finetune(training={"maxSteps": 100}).spec.training
    assert (training.max_steps, training.epochs) == (100, None)


@pytest.mark.parametrize(
    ("objective", "rate"), [("SFT", 2e-4), ("DPO", 5e-6), ("KTO", 5e-6), ("ORPO", 5e-6), ("Reward", 1e-4)]
)
def test_the_default_learning_rate_is_that_of_the_objective(objective: str, rate: float) -> None:
    chosen = {"type": objective}
    assert finetune(objective=chosen).spec.training.learning_rate == rate
    assert finetune(objective=chosen, training={"maxSteps": 5}).spec.training.learning_rate == rate
    assert finetune(objective=chosen, training={"learningRate": 0.01}).spec.training.learning_rate == 0.01


def test_a_spec_that_is_written_out_is_read_back_the_same() -> None:
    obj = finetune(training={"maxSteps": 100}, resources={"cpu": 2}, method={"type": "LoRA"})
    assert FineTune.model_validate(obj.model_dump(by_alias=True, mode="json")) == obj


def test_quantities_are_text_whatever_they_were_written_as() -> None:
    resources = finetune(resources={"cpu": 2, "memory": "16Gi"}).spec.resources
    assert (resources.cpu, resources.memory) == ("2", "16Gi")


@pytest.mark.parametrize("every", ["30s", "1h30m", "epoch", 50])
def test_checkpoints_are_saved_by_time_steps_or_epoch(every: str | int) -> None:
    assert finetune(checkpoint={"every": every}).spec.checkpoint.every == every


@pytest.mark.parametrize("every", ["often", "", "50", 0, "10 m"])
def test_any_other_checkpoint_interval_is_refused(every: str | int) -> None:
    with pytest.raises(ValidationError, match="spec.checkpoint.every"):
        finetune(checkpoint={"every": every})


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="spec.training.learning_rte"):
        finetune(training={"learning_rte": 1})


def test_a_status_of_another_version_is_understood() -> None:
    obj = {"metadata": {"name": "x"}, "spec": finetune().spec, "status": {"phase": "Training", "mood": "good"}}
    assert FineTune.model_validate(obj).status.phase == "Training"


def test_types_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        finetune().spec.training.seed = 7  # type: ignore[misc]


@pytest.mark.parametrize("duration, expected", [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("72h", 259_200)])
def test_durations_in_seconds(duration: str, expected: int) -> None:
    assert seconds(duration) == expected


# The three published recipes of the field, each in one FineTune and with nothing left over.

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_recipe_1_lora_on_dolly_with_a_checkpoint_per_epoch() -> None:
    spec = finetune(
        baseModel={"huggingFace": {"repo": "meta-llama/Llama-3.1-8B", "tokenSecretRef": {"name": "hugging-face"}}},
        dataset={
            "train": {"huggingFace": {"repo": "databricks/databricks-dolly-15k"}},
            "format": "Alpaca",
            "columns": {"input": "context", "output": "response"},
        },
        method={"type": "LoRA", "lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "targetModules": ATTENTION}},
        training={"epochs": 3, "batchSize": 16, "microBatchSize": 4, "learningRate": 2e-4, "maxLength": 512},
        checkpoint={"every": "epoch"},
    ).spec
    assert (spec.method.quantization.type, spec.checkpoint.every) == ("None", "epoch")
    assert (spec.training.batch_size, spec.training.micro_batch_size) == (16, 4)


def test_recipe_2_qlora_of_70b_on_all_seven_linear_modules() -> None:
    modules = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    spec = finetune(
        method={
            "lora": {"rank": 64, "alpha": 128, "dropout": 0.1, "targetModules": modules},
            "quantization": {"type": "NF4", "doubleQuant": True, "computeDtype": "BF16"},
        },
        training={"precision": "BF16"},
    ).spec
    assert (spec.method.type, spec.method.quantization.compute_dtype) == ("QLoRA", "BF16")
    assert spec.method.lora.target_modules == modules


def test_recipe_3_qlora_on_guanaco_merged_in_fp16_and_pushed_to_a_hub() -> None:
    spec = finetune(
        baseModel={"huggingFace": {"repo": "meta-llama/Llama-2-7b-hf", "tokenSecretRef": {"name": "hugging-face"}}},
        dataset={"train": {"huggingFace": {"repo": "timdettmers/openassistant-guanaco"}}, "format": "Text"},
        method={"lora": {"rank": 16, "alpha": 32, "targetModules": ATTENTION}},
        training={
            "epochs": 1,
            "batchSize": 16,
            "microBatchSize": 2,
            "learningRate": 2e-4,
            "maxLength": 2048,
            "gradientCheckpointing": "Enabled",
            "optimizer": "paged_adamw_32bit",
            "precision": "BF16",
        },
        output={
            "exports": ["Merged"],
            "mergedPrecision": "FP16",
            "hub": {"repo": "acme/guanaco", "content": "Merged", "tokenSecretRef": {"name": "hugging-face"}},
        },
    ).spec
    assert (spec.output.exports, spec.output.merged_precision) == (["Merged"], "FP16")
    assert spec.output.hub is not None and spec.output.hub.content == "Merged"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_in_the_examples_are_finetunes(path: Path) -> None:
    assert FineTune.model_validate(yaml.safe_load(path.read_text())).spec.dataset.train
