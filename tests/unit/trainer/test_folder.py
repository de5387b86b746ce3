"""A folder as a store: what only files can go through."""

from pathlib import Path

import pytest

from finetune_trainer.failures import RunFailure
from finetune_trainer.runspec import Storage
from finetune_trainer.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Storage(uri=f"file://{tmp_path}/out put"))


def test_a_file_that_did_not_arrive_whole_is_no_object(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"one")
    store.put_bytes("x/a.txt", b"before")
    (tmp_path / "out put/x/.a.txt.partial").write_bytes(b"hal")
    assert [entry.key for entry in store.list("x")] == ["x/a.txt"]
    monkeypatch.setattr("finetune_trainer.storage.folder.shutil.copyfileobj", lambda *_: None)  # a disk that loses data
    with pytest.raises(RunFailure, match="holds 0 bytes after an upload of 3 bytes") as caught:
        store.put_file("x/a.txt", tmp_path / "a.txt")
    assert caught.value.reason == "UploadFailed"


def test_deleting_leaves_no_empty_folder(store: Store, tmp_path: Path) -> None:
    for key in ("run/a", "run-2/a"):
        store.put_bytes(key, b"x")
    store.delete("run")
    assert [path.name for path in (tmp_path / "out put").iterdir()] == ["run-2"]


def test_a_bucket_can_be_reached_from_a_folder_and_back(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(Storage(uri=f"file://{tmp_path}/out", endpoint=endpoint), wait_seconds=2)
    bucket = store.at(f"s3://finetune/{tmp_path.name}")
    bucket.put_bytes("a", b"in the bucket")
    assert bucket.get_bytes("a") == b"in the bucket"
    assert not store.exists("a")
    assert bucket.at(store.uri()).uri("b") == store.uri("b")


def test_a_metric_that_is_no_number_is_left_out_of_json(store: Store, tmp_path: Path) -> None:
    """Python writes NaN as it is, which no other reader of JSON takes."""
    store.put_json(
        "a.json", {"loss": float("nan"), "accuracy": 0.5, "gates": [{"value": float("inf"), "passed": False}]}
    )
    assert store.get_json("a.json") == {"accuracy": 0.5, "gates": [{"passed": False}]}
    (tmp_path / "tree").mkdir()
    store.upload_tree(tmp_path / "tree", "x", {"evaluation": {"loss": float("-inf")}})
    assert "Infinity" not in (tmp_path / "out put/x/manifest.json").read_text()
