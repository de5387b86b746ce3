"""What a bucket and a folder have in common: trees with manifests, and what is refused of them."""

from pathlib import Path

import pytest

from finetune_trainer.digest import hash_tree, tree_digest
from finetune_trainer.failures import RunFailure
from finetune_trainer.runspec import Storage
from finetune_trainer.storage.connection import ObjectNotFound
from finetune_trainer.storage.store import Store


@pytest.fixture(params=["bucket", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Store(Storage(uri=f"file://{tmp_path}/out put"))
    endpoint = request.getfixturevalue("endpoint")
    return Store(Storage(uri=f"s3://finetune/{tmp_path.name}", endpoint=endpoint), wait_seconds=2)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/a.txt").write_bytes(b"one")
    (tmp_path / "tree/sub/b c.bin").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "tree/empty").write_bytes(b"")
    return tmp_path / "tree"


def test_a_tree_comes_back_as_it_went(store: Store, tree: Path, tmp_path: Path) -> None:
    digest = store.upload_tree(tree, "adapters/x", {"rank": 16})
    assert digest == tree_digest(hash_tree(tree))
    manifest = store.download_tree("adapters/x", tmp_path / "back", digest)
    assert manifest["rank"] == 16
    assert hash_tree(tmp_path / "back") == hash_tree(tree)
    assert store.verify_tree("adapters/x") == manifest
    assert [entry.key for entry in store.list("adapters/x")] == [
        "adapters/x/a.txt", "adapters/x/empty", "adapters/x/manifest.json", "adapters/x/sub/b c.bin"
    ]  # fmt: skip


def test_without_its_manifest_a_tree_does_not_exist(store: Store, tree: Path, tmp_path: Path) -> None:
    store.upload_tree(tree, "half")
    store.delete("half/manifest.json")
    assert store.manifest("half") is None
    assert store.verify_tree("half") is None
    with pytest.raises(RunFailure, match="has no manifest.json: it was never completed"):
        store.download_tree("half", tmp_path / "back")


def test_a_changed_file_is_refused(store: Store, tree: Path, tmp_path: Path) -> None:
    digest = store.upload_tree(tree, "x")
    store.put_bytes("x/a.txt", b"two")
    with pytest.raises(RunFailure, match=r"x/a.txt is not the file that its manifest lists") as caught:
        store.download_tree("x", tmp_path / "back", digest)
    assert caught.value.reason == "DigestMismatch"
    store.put_bytes("x/a.txt", b"longer")
    assert store.verify_tree("x") is None


def test_another_digest_than_asked_for_is_refused(store: Store, tree: Path, tmp_path: Path) -> None:
    digest = store.upload_tree(tree, "x")
    with pytest.raises(RunFailure, match=f"has digest {digest}, sha256:00 was asked for"):
        store.download_tree("x", tmp_path / "back", "sha256:00")


def test_a_forged_manifest_is_refused(store: Store, tree: Path) -> None:
    store.upload_tree(tree, "x")
    manifest = store.get_json("x/manifest.json")
    assert manifest
    manifest["files"][0]["size"] += 1
    store.put_json("x/manifest.json", manifest)
    with pytest.raises(RunFailure, match="cannot be trusted"):
        store.manifest("x")


def test_what_is_not_there_is_none_or_not_found(store: Store) -> None:
    assert store.get_json("nothing") is None
    assert store.stat("nothing") is None
    with pytest.raises(ObjectNotFound):
        store.get_bytes("nothing")
    assert store.list("nothing") == []


def test_deleting_a_folder_leaves_its_neighbours(store: Store) -> None:
    for key in ("run/a", "run/manifest.json", "run-2/a"):
        store.put_bytes(key, b"x")
    assert store.delete("run") == 2
    assert [entry.key for entry in store.list()] == ["run-2/a"]
