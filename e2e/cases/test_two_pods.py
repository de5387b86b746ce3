"""One run on two nodes: two pods that train together what one would have trained."""

from __future__ import annotations

import pytest

from e2e.cases.conftest import Apply
from e2e.cases.handles import Handle
from e2e.cases.objects import finetune, training
from e2e.kubectl import Kubectl, Object

STEPS = 6
# Without dropout, whose noise differs from process to process, and in float32 only the order of the sums is another.
EXACT: Object = {"type": "LoRA", "lora": {"rank": 8, "alpha": 16, "dropout": 0}}
TOLERANCE = 1e-3
# Between what half of the demo's model takes and all of it, 2 MB apart; most of it is said to be a CUDA context's.
ROOM_FOR_HALF: Object = {"gpus": 1, "gpuMemory": "610M"}


def on_nodes(name: str, nodes: int, namespace: str, seed: int, gpus: Object | None = None) -> Object:
    """The same FineTune on some nodes, in a place of its own: in one place the second would reuse the first's result."""
    place = f"{namespace}-{name}"
    return finetune(
        name,
        namespace,
        seed,
        dataset={"train": {"configMap": {"name": "rows", "key": "train.jsonl"}}, "evaluation": {"fraction": 0.2}},
        method=EXACT,
        training=training(seed, STEPS, precision="FP32"),
        resources={"gpus": 0, "nodes": nodes, "cpu": "100m"} | (gpus or {}),
        output={"s3": {"uri": f"s3://finetune/{place}"}},
    )


def indexes(pods: list[Object]) -> list[str]:
    """The completion indexes of the train pods."""
    labels = [pod["metadata"]["labels"] for pod in pods]
    key = "batch.kubernetes.io/job-completion-index"
    return sorted(found[key] for found in labels if found["finetune.dev/stage"] == "train" and key in found)


def test_two_pods_have_the_loss_of_one(namespace: str, kubectl: Kubectl, apply: Apply, seed: int) -> None:
    one: Handle = apply(on_nodes("on-1", 1, namespace, seed))
    two: Handle = apply(on_nodes("on-2", 2, namespace, seed))
    expected, found = (tune.wait_true("Complete")["status"] for tune in (one, two))
    assert found["run"]["attempt"] == 1
    assert indexes(two.owned("pods")) == ["0", "1"]
    assert_as_good(found, expected)
    assert two.owned("services")
    two.delete()
    kubectl.wait_gone("jobs,services,pods", "-l", "finetune.dev/finetune=on-2", "-n", namespace)


def test_two_pods_share_a_model_that_one_gpu_has_no_room_for(namespace: str, apply: Apply, seed: int) -> None:
    one: Handle = apply(on_nodes("whole", 1, namespace, seed))
    two: Handle = apply(on_nodes("halves", 2, namespace, seed, ROOM_FOR_HALF))
    expected, found = (tune.wait_true("Complete")["status"] for tune in (one, two))
    assert (found["estimate"]["verdict"], found["estimate"]["shards"]) == ("Fits", 2)
    assert "the base model shared out over 2 GPUs" in found["estimate"]["message"]
    assert indexes(two.owned("pods")) == ["0", "1"]
    assert_as_good(found, expected)


def assert_as_good(found: Object, expected: Object) -> None:
    """Two statuses of the same training."""
    assert found["progress"]["step"] == STEPS
    assert found["progress"]["loss"] == pytest.approx(expected["progress"]["loss"], abs=TOLERANCE)
    assert found["evaluation"]["base"]["loss"] == pytest.approx(expected["evaluation"]["base"]["loss"], abs=TOLERANCE)
    assert found["evaluation"]["adapter"]["loss"] == pytest.approx(
        expected["evaluation"]["adapter"]["loss"], abs=10 * TOLERANCE
    )
