"""Data and base models from every kind of source, and what a source that refuses looks like."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cases.conftest import Apply, make_namespace
from e2e.cases.objects import finetune, from_config_map, small_dataset
from e2e.cases.webserver import start_hub
from e2e.demo.base_model import base_model
from e2e.demo.namespace import secret
from e2e.kubectl import Kubectl, Object

NAMESPACE = "e2e-sources"
ARC_CARD = """---
configs:
- config_name: ARC-Easy
  data_files:
  - split: train
    path: train.jsonl
  - split: test
    path: test.jsonl
---
"""
ARC_ROW = {
    "id": "1",
    "question": "What is the light when there is no link?",
    "choices": {"text": ["amber", "blue"], "label": ["A", "B"]},
    "answerKey": "A",
}
ARC_ROWS = (json.dumps(ARC_ROW) + "\n").encode() * 3
ACCESS = {"tokens": {"hf_member": ["acme/gated"], "hf_stranger": []}, "gated": ["acme/gated"]}


@pytest.fixture(scope="module")
def hub(kubectl: Kubectl) -> Iterator[str]:
    make_namespace(kubectl, NAMESPACE)
    files = {
        "hub.json": json.dumps(ACCESS).encode(),
        "datasets/acme/facts/train.jsonl": small_dataset().encode(),
        **{f"models/acme/gated/{name}": b"{}" for name in ("config.json", "model.safetensors", "tokenizer.json")},
        "datasets/allenai/ai2_arc/README.md": ARC_CARD.encode(),
        **{f"datasets/allenai/ai2_arc/{split}.jsonl": ARC_ROWS for split in ("train", "test")},
        **{f"models/acme/tiny/{name}": content for name, content in folder(base_model()).items()},
    }
    for name, token in {"member": "hf_member", "stranger": "hf_stranger", "mistyped": "hf_wrong"}.items():
        kubectl.apply(secret(name, NAMESPACE, {"token": base64.b64encode(token.encode()).decode()}))
    yield start_hub(kubectl, NAMESPACE, files)
    kubectl.run("delete", "namespace", NAMESPACE, "--wait=false")


def folder(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def at(hub: str) -> Object:
    return {"env": [{"name": "HF_ENDPOINT", "value": hub}]}


def model(repo: str, token: str | None = None) -> Object:
    reference = {"tokenSecretRef": {"name": token, "key": "token"}} if token else {}
    return {"huggingFace": {"repo": repo, **reference}}


def test_model_and_data_come_from_the_hub_and_are_pinned(hub: str, apply: Apply, seed: int) -> None:
    source = {"huggingFace": {"repo": "acme/facts"}}
    tune = apply(
        finetune(
            "from-hub", NAMESPACE, seed, steps=2,
            baseModel=model("acme/tiny"), dataset={"train": source}, podTemplate=at(hub),
        )
    )  # fmt: skip
    status = tune.wait_true("Complete")["status"]
    assert len(status["baseModel"]["revision"]) == 40
    assert status["dataset"]["samples"] == 24
    train = next(pod for pod in tune.owned("pods") if pod["metadata"]["labels"]["finetune.dev/stage"] == "train")
    assert not [v["name"] for v in train["spec"]["containers"][0]["env"] if v["name"].endswith("_HF_TOKEN")]


def test_a_task_is_fetched_by_prepare_and_its_metric_is_a_gate(hub: str, apply: Apply, seed: int) -> None:
    asked = {"tasks": [{"name": "arc_easy", "limit": 2}], "gates": [{"metric": "arc_easy/acc", "min": 0}]}
    status = apply(finetune("asked", NAMESPACE, seed, steps=2, evaluation=asked, podTemplate=at(hub))).wait_true(
        "Complete"
    )["status"]
    assert status["dataset"]["tasks"]["questions"] == 2
    assert {"arc_easy/acc"} <= status["evaluation"]["base"].keys() & status["evaluation"]["adapter"].keys()
    assert status["adapter"]["gatePassed"] is True


def test_a_task_that_nobody_knows_is_refused_before_a_gpu_is_asked_for(hub: str, apply: Apply, seed: int) -> None:
    tune = apply(
        finetune("unknown", NAMESPACE, seed, evaluation={"tasks": [{"name": "arc_eazy"}]}, podTemplate=at(hub))
    )
    failed = tune.wait_failed()
    assert failed["reason"] == "InvalidTask"
    assert "arc_easy" in failed["message"]
    assert tune.stages() == ["prepare"]


@pytest.mark.parametrize(
    ("repo", "token", "reason"),
    [
        ("acme/gated", "stranger", "BaseModelGated"),
        ("acme/gated", None, "BaseModelGated"),
        ("acme/tiny", "mistyped", "HubUnauthorized"),
        ("acme/none", "member", "BaseModelNotFound"),
    ],
)
def test_a_hub_that_refuses_says_which_repository_and_what_to_do(
    hub: str, apply: Apply, seed: int, repo: str, token: str | None, reason: str
) -> None:
    name = f"{repo.split('/')[1]}-{token or 'no-token'}"
    tune = apply(finetune(name, NAMESPACE, seed, baseModel=model(repo, token), podTemplate=at(hub)))
    failed = tune.wait_failed()
    assert failed["reason"] == reason
    assert repo in failed["message"]
    assert "hf_" not in failed["message"]
    assert tune.stages() == ["prepare"]


def test_http_data_is_used_when_its_hash_matches(hub: str, apply: Apply, seed: int) -> None:
    source = {"http": {"url": facts(hub), "sha256": hashlib.sha256(small_dataset().encode()).hexdigest()}}
    tune = apply(finetune("from-http", NAMESPACE, seed, steps=2, dataset={"train": source}))
    assert tune.wait_true("Complete")["status"]["dataset"]["samples"] == 24


def test_http_data_with_another_hash_is_refused(hub: str, apply: Apply, seed: int) -> None:
    source = {"http": {"url": facts(hub), "sha256": "0" * 64}}
    tune = apply(finetune("other-hash", NAMESPACE, seed, dataset={"train": source}, retry={"infrastructure": 0}))
    failed = tune.wait_failed()
    assert failed["reason"] == "InvalidDataset"
    assert facts(hub) in failed["message"]
    assert tune.stages() == ["prepare"]


def facts(hub: str) -> str:
    return f"{hub}/datasets/acme/facts/resolve/main/train.jsonl"


def test_a_config_map_that_comes_later_is_waited_for(namespace: str, kubectl: Kubectl, apply: Apply, seed: int) -> None:
    tune = apply(finetune("early", namespace, seed, steps=2, dataset={"train": from_config_map("later")}))
    tune.wait(
        "says what is missing", lambda found: "later" in json.dumps(found.get("status", {}).get("conditions")) or None
    )
    data = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "later", "namespace": namespace}}
    kubectl.apply({**data, "data": {"train.jsonl": small_dataset()}})
    tune.wait_true("Complete")
