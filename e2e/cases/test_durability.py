"""What a run meets on the way and outlives: too little memory, a bucket that is gone for a while."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from e2e.cases.conftest import Apply
from e2e.cases.node import process_of
from e2e.cases.objects import config_map, finetune, from_config_map, jsonl, resources, training
from e2e.cluster.layout import SYSTEM_NAMESPACE
from e2e.cluster.target import target
from e2e.kubectl import Kubectl, Object

WORDS = ["link", "gateway", "mirror", "lantern", "noon", "harbour", "signal", "keeper", "tide"]


def test_a_run_out_of_host_memory_goes_on_with_half_the_micro_batch(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    """One step of 16 rows of 1,024 tokens: at once they need 1.7 GB or more, 8 of them 1.3 GB, in the container."""
    rows = [{"text": " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(1200))} for i in range(16)]
    kubectl.apply(config_map("long", namespace, {"train.jsonl": jsonl(rows)}))
    tune = apply(
        finetune(
            "hungry",
            namespace,
            seed,
            dataset={"train": from_config_map("long")},
            training=training(seed, steps=1, batchSize=16, microBatchSize=16, maxLength=1024),
            resources={**resources(), "memory": "1500Mi"},
        )
    )
    run = tune.wait_true("Complete")["status"]["run"]
    # A CPU without bfloat16 computes in float32, and halves once more.
    assert run["changed"][0] == "micro batch 16 -> 8 after OutOfMemory in attempt 1; the effective batch stays 16"
    assert run["outOfMemoryRetries"] == len(run["changed"]) and run["infrastructureRetries"] == 0
    assert run["microBatch"] == 16 >> len(run["changed"])


def test_a_bucket_that_is_gone_at_the_last_upload_is_waited_for_and_said(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    if not target().embedded:
        pytest.skip("open connections to MinIO can only be cut on the node, which is this machine")
    tune = apply(finetune("patient", namespace, seed, steps=30, checkpoint={"every": "1h"}))
    # The pod says so once everything is downloaded: what it needs the bucket for next are its results.
    tune.wait("the base model is loaded", lambda found: found.get("status", {}).get("run", {}).get("microBatch"))

    def waits(found: Object) -> Object | None:
        status: Object = found["status"]
        return status if status["reason"] == "StorageUnavailable" else None

    with bucket_gone(kubectl):
        status = tune.wait("it says that it waits", waits)
    assert status["phase"] in ("Training", "Evaluating")
    assert "does not answer" in status["message"] and "goes on by itself" in status["message"]
    told = kubectl.items("events", "-n", namespace, "--field-selector", "reason=StorageUnavailable")
    assert [event["involvedObject"]["name"] for event in told] == ["patient"]
    status = tune.wait_true("Complete")["status"]
    assert (status["run"]["attempt"], status["run"]["infrastructureRetries"]) == (1, 0)
    assert status["progress"]["step"] == 30


@contextmanager
def bucket_gone(kubectl: Kubectl) -> Iterator[None]:
    """Within it nobody reaches MinIO; its data stays."""

    def select(cut: str | None) -> None:
        change = json.dumps({"spec": {"selector": {"finetune.dev/cut": cut}}})
        kubectl.run("patch", "service", "minio", "-n", SYSTEM_NAMESPACE, "--type=merge", "-p", change)

    select("yes")
    try:
        (pod,) = kubectl.items("pods", "-n", SYSTEM_NAMESPACE, "-l", "app.kubernetes.io/component=minio")
        # What is connected already would go on.
        os.kill(process_of(pod["metadata"]["uid"], b"/minio"), signal.SIGKILL)
        yield
    finally:
        select(None)
    kubectl.run("rollout", "status", "deployment/minio", "-n", SYSTEM_NAMESPACE, "--timeout=60s", timeout=70)
