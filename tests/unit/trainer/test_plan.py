"""The micro batch by the GPU's memory, as its pod finds it."""

import pytest

from finetune_trainer.failures import RunFailure
from finetune_trainer.memory.estimate import GIB
from finetune_trainer.memory.plan import choose_micro_batch, choose_shards
from finetune_trainer.runspec import PrepareResult, RunSpec, Storage

from .test_estimate import shape, spec


def run(**parts: object) -> RunSpec:
    storage = Storage(uri="s3://finetune")
    return RunSpec(stage="train", namespace="demo", name="bot", job="bot-1", spec=spec(**parts), storage=storage)


def test_a_gpus_share_of_the_batch_bounds_the_micro_batch() -> None:
    rows, _ = choose_micro_batch(run(), shape("Llama-3.1-8B"), share=2, memory=80 * GIB)
    assert rows == 2


def test_weights_without_room_fail_before_they_are_loaded_and_the_gpus_that_would_do_are_named() -> None:
    with pytest.raises(RunFailure, match="4 GPUs that share the base model") as refused:
        choose_micro_batch(run(), shape("Llama-3.1-70B"), share=1, memory=24 * GIB)
    assert refused.value.reason == "DoesNotFit"


def test_processes_share_the_base_model_as_the_verdict_said_or_as_the_gpu_at_hand_demands() -> None:
    several, model = run(resources={"gpus": 4}), shape("Llama-3.1-70B")
    assert choose_shards(several, model, 24 * GIB) == 4
    assert choose_shards(several, model, 80 * GIB) == 1
    assert choose_shards(several, model, None) == 1
    prepared = PrepareResult.model_validate(
        {"runId": "0123456789abcdef", "baseModel": {}, "dataset": {}, "estimate": {"verdict": "Fits", "shards": 4}}
    )
    assert choose_shards(several.model_copy(update={"prepared": prepared}), model, None) == 4
