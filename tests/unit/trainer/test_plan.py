"""The micro batch by the GPU's memory, as its pod finds it."""

import pytest

from finetune_trainer.estimate import GIB
from finetune_trainer.failures import RunFailure
from finetune_trainer.plan import choose_micro_batch
from finetune_trainer.runspec import RunSpec, Storage

from .test_estimate import shape, spec


def run(**parts: object) -> RunSpec:
    storage = Storage(uri="s3://finetune")
    return RunSpec(stage="train", namespace="demo", name="bot", job="bot-1", spec=spec(**parts), storage=storage)


def test_a_gpus_share_of_the_batch_bounds_the_micro_batch() -> None:
    rows, _ = choose_micro_batch(run(), shape("Llama-3.1-8B"), share=2, memory=80 * GIB)
    assert rows == 2


def test_weights_without_room_fail_before_they_are_loaded_on_any_number_of_gpus() -> None:
    several = run(resources={"gpus": 8, "nodes": 2})
    with pytest.raises(RunFailure, match="sharding it over GPUs is not supported yet") as refused:
        choose_micro_batch(several, shape("Llama-3.1-70B"), share=1, memory=24 * GIB)
    assert refused.value.reason == "DoesNotFit"
