"""The clean-up step against a real MinIO: what is named goes, everything else stays."""

import json
from pathlib import Path

import pytest

from finetune_trainer import cleanup
from finetune_trainer.cleanup import main
from finetune_trainer.cleanupspec import CleanupSpec
from finetune_trainer.runspec import Storage
from finetune_trainer.storage.store import Store

RUN, ADAPTER, MODEL = "runs/" + "a" * 16, "adapters/" + "b" * 64, "models/" + "c" * 64


@pytest.fixture
def place(endpoint: str, tmp_path: Path) -> Storage:
    return Storage(uri=f"s3://finetune/{tmp_path.name}", endpoint=endpoint, region="us-east-1")


@pytest.fixture
def store(place: Storage) -> Store:
    """With a run, an adapter, and what must stay."""
    store = Store(place)
    for key in (
        f"{RUN}/run.json",
        f"{RUN}/checkpoints/step-1/x",
        f"{ADAPTER}/manifest.json",
        f"{ADAPTER}/adapter.json",
    ):
        store.put_bytes(key, b"{}")
    for key in (f"{RUN}0/run.json", f"{MODEL}/config.json", "datasets/x/train.parquet"):
        store.put_bytes(key, b"{}")
    return store


def run(place: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch, *uris: str) -> tuple[int, dict[str, object]]:
    """(exit code, termination message)"""
    spec = CleanupSpec(storage=place, uris=list(uris))
    (folder / "spec.json").write_text(spec.model_dump_json(by_alias=True))
    monkeypatch.setenv("TERMINATION_LOG", str(folder / "result.json"))
    code = main(["--spec", str(folder / "spec.json")])
    return code, json.loads((folder / "result.json").read_text())


def test_what_is_named_goes_and_the_rest_stays_and_once_more_is_no_failure(
    place: Storage, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = (store.uri(RUN), store.uri(ADAPTER))
    assert run(place, tmp_path, monkeypatch, *uris) == (0, {"objects": 4})
    assert {entry.key for entry in store.list()} == {
        f"{RUN}0/run.json",
        f"{MODEL}/config.json",
        "datasets/x/train.parquet",
    }
    assert run(place, tmp_path, monkeypatch, *uris) == (0, {"objects": 0})


@pytest.mark.parametrize("path", [MODEL, "datasets/x", "", "runs", "adapters", f"{ADAPTER}/..", "runs/../models"])
def test_nothing_is_deleted_when_one_folder_is_not_what_a_run_writes(
    place: Storage, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    code, told = run(place, tmp_path, monkeypatch, store.uri(RUN), f"{store.uri()}/{path}".rstrip("/"))
    assert code == 1 and "nothing is deleted" in json.dumps(told)
    assert len(store.list()) == 7


def test_a_bucket_that_is_gone_is_clean(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Storage(uri="s3://gone-for-good", endpoint=endpoint, region="us-east-1")
    assert run(gone, tmp_path, monkeypatch, f"s3://gone-for-good/{RUN}") == (0, {"objects": 0})


def test_a_store_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "WAIT_SECONDS", 0.1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    nobody = Storage(uri="s3://finetune", endpoint="http://127.0.0.1:9", region="us-east-1")
    code, told = run(nobody, tmp_path, monkeypatch, f"s3://finetune/{RUN}")
    assert code == 1 and "StorageUnavailable" in json.dumps(told)
