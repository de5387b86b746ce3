"""A folder as a store: the contract of the bucket, on files."""

from pathlib import Path

import pytest

from finetune_trainer.connection import ObjectNotFound
from finetune_trainer.digest import hash_tree, tree_digest
from finetune_trainer.failures import RunFailure
from finetune_trainer.runspec import Storage
from finetune_trainer.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Storage(uri=f"file://{tmp_path}/out put"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/a.txt").write_bytes(b"one")
    (tmp_path / "tree/sub/b c.bin").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "tree/empty").write_bytes(b"")
    return tmp_path / "tree"


def test_a_tree_comes_back_as_it_went(store: Store, tree: Path, tmp_path: Path) -> None:
    digest = store.upload_tree(tree, "adapters/x", {"rank": 16})
    assert digest == tree_digest(hash_tree(tree)) == tree_digest(hash_tree(tmp_path / "out put/adapters/x"))
    manifest = store.at(store.uri("adapters/x")).download_tree("", tmp_path / "back", digest)
    assert manifest["rank"] == 16
    assert hash_tree(tmp_path / "back") == hash_tree(tree)
    assert store.verify_tree("adapters/x") == manifest
    assert [entry.key for entry in store.list("adapters/x")] == [
        "adapters/x/a.txt", "adapters/x/empty", "adapters/x/manifest.json", "adapters/x/sub/b c.bin"
    ]  # fmt: skip


def test_a_file_that_did_not_arrive_whole_is_no_object(
    store: Store, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("x/a.txt", b"before")
    (tmp_path / "out put/x/.a.txt.partial").write_bytes(b"hal")
    assert [entry.key for entry in store.list("x")] == ["x/a.txt"]
    monkeypatch.setattr("finetune_trainer.folder.shutil.copyfileobj", lambda *_: None)  # a disk that loses data
    with pytest.raises(RunFailure, match="holds 0 bytes after an upload of 3 bytes") as caught:
        store.put_file("x/a.txt", tree / "a.txt")
    assert caught.value.reason == "UploadFailed"


def test_a_changed_file_is_refused(store: Store, tree: Path, tmp_path: Path) -> None:
    digest = store.upload_tree(tree, "x")
    store.put_bytes("x/a.txt", b"two")
    with pytest.raises(RunFailure, match=r"x/a.txt is not the file that its manifest lists"):
        store.download_tree("x", tmp_path / "back", digest)


def test_what_is_not_there_is_none_or_not_found(store: Store) -> None:
    assert store.get_json("nothing") is None
    assert store.stat("nothing") is None
    assert store.list("nothing") == []
    with pytest.raises(ObjectNotFound):
        store.get_bytes("nothing")


def test_deleting_a_folder_leaves_its_neighbours_and_no_empty_folder(store: Store, tmp_path: Path) -> None:
    for key in ("run/a", "run/manifest.json", "run-2/a"):
        store.put_bytes(key, b"x")
    assert store.delete("run") == 2
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
