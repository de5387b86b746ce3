"""The prepare Job as a process, against a hub-compatible server: the real client, the mirror in the bucket, refusals, exit codes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.runspec import Result, RunSpec, Storage
from finetune_trainer.storage.store import Store
from tests.hub_server.server import HubServer

from .tiny import finetune_spec

ROWS = [{"instruction": f"alpha {n}", "context": "", "response": f"beta {n}", "category": "qa"} for n in range(12)]


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Path) -> Iterator[HubServer]:
    root = tmp_path / "hub"
    for repo in ("models/acme/tiny", "models/acme/gated"):
        shutil.copytree(tiny_llama, root / repo)
    (root / "models/acme/pickled").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny_llama / name, root / "models/acme/pickled" / name)
    (root / "models/acme/pickled/pytorch_model.bin").write_bytes(b"pickle")
    (root / "datasets/acme/facts/data").mkdir(parents=True)
    (root / "datasets/acme/facts/data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "datasets/acme/facts/data/test.jsonl").write_text(json.dumps({**ROWS[0], "response": "gamma"}) + "\n")
    access = {"tokens": {"hf_member": ["acme/gated"], "hf_stranger": []}, "gated": ["acme/gated"], "private": []}
    (root / "hub.json").write_text(json.dumps(access))
    with HubServer(root) as server:
        yield server


class Job:
    """Runs prepare as the image does; `result` is its termination message."""

    def __init__(
        self,
        folder: Path,
        hub: HubServer,
        endpoint: str,
        base_model: dict[str, Any],
        dataset: dict[str, Any],
        token: str = "",
    ) -> None:
        spec = finetune_spec(baseModel={"s3": None, **base_model}, dataset=dataset)
        self.storage = Storage(uri=f"s3://finetune/{folder.parent.name}", endpoint=endpoint)
        run = RunSpec(stage="prepare", namespace="demo", name="t", job="t-prepare", spec=spec, storage=self.storage)
        folder.mkdir()
        (folder / "spec.json").write_text(run.model_dump_json(by_alias=True))
        environment = {
            **os.environ,
            "HOME": str(folder),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "FINETUNE_WORK": str(folder),
            "TERMINATION_LOG": str(folder / "termination-log"),
        } | ({"FINETUNE_BASE_MODEL_HF_TOKEN": token} if token else {})
        command = [sys.executable, "-m", "finetune_trainer", "prepare", "--spec", str(folder / "spec.json")]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, cwd=folder)
        self.exit_code, self.log = done.returncode, done.stdout + done.stderr
        assert (folder / "termination-log").exists(), self.log
        self.result = Result.model_validate_json((folder / "termination-log").read_bytes())


TINY = {"huggingFace": {"repo": "acme/tiny"}}
FACTS = {
    "train": {"huggingFace": {"repo": "acme/facts"}},
    "evaluation": {"huggingFace": {"repo": "acme/facts", "split": "test"}},
}


def test_a_hub_model_is_mirrored_once_and_a_hub_dataset_read(tmp_path: Path, hub: HubServer, endpoint: str) -> None:
    first = Job(tmp_path / "first", hub, endpoint, TINY, FACTS)
    assert first.exit_code == 0, first.log
    prepared = first.result.prepared
    assert prepared
    assert (prepared.dataset.format, prepared.dataset.samples, prepared.dataset.evaluation_samples) == ("Alpaca", 12, 1)
    assert len(prepared.base_model.revision) == 40
    store = Store(first.storage)
    assert store.verify_tree(f"models/{prepared.base_model.digest.removeprefix('sha256:')}")
    assert "mirrored model.safetensors" in first.log

    second = Job(tmp_path / "second", hub, endpoint, TINY, FACTS)
    assert second.result.prepared == prepared
    assert "is mirrored already" in second.log


@pytest.mark.parametrize(
    ("base_model", "token", "reason", "message"),
    [
        ("acme/missing", "", "BaseModelNotFound", "baseModel.huggingFace.repo: acme/missing is not on http"),
        ("acme/gated", "", "BaseModelGated", "acme/gated is gated"),
        ("acme/gated", "hf_stranger", "BaseModelGated", "accept its terms there with the token's account"),
        ("acme/tiny", "hf_expired", "HubUnauthorized", "refuses the token for acme/tiny"),
        ("acme/pickled", "", "UnsupportedCombination", "only as pickle (pytorch_model.bin), which is never read"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_with_the_fix(
    tmp_path: Path, hub: HubServer, endpoint: str, base_model: str, token: str, reason: str, message: str
) -> None:
    job = Job(tmp_path / "job", hub, endpoint, {"huggingFace": {"repo": base_model}}, FACTS, token)
    assert job.exit_code == 1
    assert job.result.failure
    assert job.result.failure.reason == reason, job.log
    assert message in job.result.failure.message
    assert token not in job.log or not token


def test_a_token_opens_a_gated_model(tmp_path: Path, hub: HubServer, endpoint: str) -> None:
    job = Job(tmp_path / "job", hub, endpoint, {"huggingFace": {"repo": "acme/gated"}}, FACTS, "hf_member")
    assert job.exit_code == 0, job.log
    assert "hf_member" not in job.log


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"repo": "acme/nothing"}, "dataset.train.huggingFace.repo: acme/nothing is not on"),
        ({"repo": "acme/facts", "split": "dev"}, "split"),
        (
            {"repo": "acme/facts", "revision": "v9"},
            "dataset.train.huggingFace.revision: acme/facts has no revision 'v9'",
        ),
    ],
)
def test_a_hub_dataset_that_does_not_exist_is_named(
    tmp_path: Path, hub: HubServer, endpoint: str, source: dict[str, str], message: str
) -> None:
    job = Job(tmp_path / "job", hub, endpoint, TINY, {"train": {"huggingFace": source}})
    assert job.result.failure
    assert job.result.failure.reason == "DatasetNotFound", job.log
    assert message in job.result.failure.message
