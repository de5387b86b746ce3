"""What a user did wrong: named exactly, at once, and before a GPU is used."""

from __future__ import annotations

import base64

from e2e.cases.conftest import Apply
from e2e.cases.objects import config_map, finetune, from_config_map, small_dataset
from e2e.demo.namespace import secret
from e2e.kubectl import Kubectl


def test_a_bad_row_fails_with_file_and_line_and_no_gpu_pod_ever_exists(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    good = small_dataset().splitlines(keepends=True)
    broken = "".join([*good[:6], '{"messages": [{"role": "wizard", "content": 7}]}\n', *good[6:]])
    kubectl.apply(config_map("broken", namespace, {"train.jsonl": broken}))
    tune = apply(finetune("bad-rows", namespace, seed, dataset={"train": from_config_map("broken")}))
    failed = tune.wait_failed()
    assert failed["reason"] == "InvalidDataset"
    assert "train.jsonl" in failed["message"]
    assert "line 7" in failed["message"] or "train.jsonl:7" in failed["message"]
    assert tune.stages() == ["prepare"]
    assert not [pod for pod in tune.owned("pods") if "nvidia.com/gpu" in str(pod["spec"]["containers"])]
    assert tune.status["phase"] == "Failed"


def test_wrong_storage_credentials_are_named_and_not_shown(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    encoded = {
        "AWS_ACCESS_KEY_ID": base64.b64encode(b"mallory").decode(),
        "AWS_SECRET_ACCESS_KEY": base64.b64encode(b"not-the-secret").decode(),
    }
    kubectl.apply(secret("wrong", namespace, encoded))
    output = {"s3": {"uri": "s3://finetune", "credentialsSecretRef": {"name": "wrong"}}}
    tune = apply(finetune("wrong-keys", namespace, seed, output=output))
    failed = tune.wait_failed()
    assert failed["reason"] == "StorageUnauthorized"
    assert "AWS_ACCESS_KEY_ID" in failed["message"]
    assert "not-the-secret" not in kubectl.run("get", "finetune,jobs,pods,events", "-n", namespace, "-o", "yaml")


def test_a_missing_dataset_is_named(namespace: str, apply: Apply, seed: int) -> None:
    source = {"s3": {"uri": "s3://datasets/nobody/put/this/here.jsonl"}}
    tune = apply(finetune("no-data", namespace, seed, dataset={"train": source}))
    failed = tune.wait_failed()
    assert failed["reason"] == "DatasetNotFound"
    assert "s3://datasets/nobody/put/this/here.jsonl" in failed["message"]
