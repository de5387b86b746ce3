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


def on_nodes(nodes: int, namespace: str, seed: int) -> Object:
    """The same FineTune on some nodes, in a place of its own: in one place the second would reuse the first's result."""
    place = f"{namespace}-{nodes}"
    return finetune(
        f"on-{nodes}",
        namespace,
        seed,
        dataset={"train": {"configMap": {"name": "rows", "key": "train.jsonl"}}, "evaluation": {"fraction": 0.2}},
        method=EXACT,
        training=training(seed, STEPS, precision="FP32"),
        resources={"gpus": 0, "nodes": nodes, "cpu": "100m"},
        output={"s3": {"uri": f"s3://finetune/{place}"}},
    )


def indexes(pods: list[Object]) -> list[str]:
    """The completion indexes of the train pods."""
    labels = [pod["metadata"]["labels"] for pod in pods]
    key = "batch.kubernetes.io/job-completion-index"
    return sorted(found[key] for found in labels if found["finetune.dev/stage"] == "train" and key in found)


def test_two_pods_have_the_loss_of_one(namespace: str, kubectl: Kubectl, apply: Apply, seed: int) -> None:
    one: Handle = apply(on_nodes(1, namespace, seed))
    two: Handle = apply(on_nodes(2, namespace, seed))
    expected, found = (tune.wait_true("Complete")["status"] for tune in (one, two))
    assert found["run"]["attempt"] == 1
    assert indexes(two.owned("pods")) == ["0", "1"]
    assert found["progress"]["step"] == STEPS
    assert found["progress"]["loss"] == pytest.approx(expected["progress"]["loss"], abs=TOLERANCE)
    assert found["evaluation"]["base"]["loss"] == pytest.approx(expected["evaluation"]["base"]["loss"], abs=TOLERANCE)
    assert found["evaluation"]["adapter"]["loss"] == pytest.approx(
        expected["evaluation"]["adapter"]["loss"], abs=10 * TOLERANCE
    )
    assert two.owned("services")
    two.delete()
    kubectl.wait_gone("jobs,services,pods", "-l", "finetune.dev/finetune=on-2", "-n", namespace)
