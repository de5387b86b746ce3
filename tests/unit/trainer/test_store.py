"""The object store against a real MinIO: trees with manifests, verification, and what happens when the server is gone."""

import logging
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from finetune_trainer import store as store_module
from finetune_trainer.digest import hash_tree, tree_digest
from finetune_trainer.failures import RunFailure
from finetune_trainer.runspec import Storage
from finetune_trainer.store import ObjectNotFound, Store

from .minio_server import minio_server


@pytest.fixture
def store(endpoint: str, tmp_path: Path) -> Store:
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


def test_large_files_travel_in_parts_and_ranges(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_PART", 5 << 20)
    monkeypatch.setattr(store_module, "_RANGE", 3 << 20)
    (tmp_path / "large").mkdir()
    (tmp_path / "large/file").write_bytes(bytes(range(251)) * 50_000)
    digest = store.upload_tree(tmp_path / "large", "large")
    stored = store.stat("large/file")
    assert stored
    assert stored.etag.endswith("-3")
    seen: list[int] = []
    store.download_tree("large", tmp_path / "back", digest, on_bytes=seen.append)
    assert sum(seen) == 50_000 * 251
    assert len(seen) == 4
    store.download_tree("large", tmp_path / "back", digest, on_bytes=lambda _: pytest.fail("downloaded again"))


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
    with pytest.raises(ObjectNotFound):
        store.at("s3://no-such-bucket").list()


def test_deleting_a_folder_leaves_its_neighbours(store: Store) -> None:
    for key in ("run/a", "run/manifest.json", "run-2/a"):
        store.put_bytes(key, b"x")
    assert store.delete("run") == 2
    assert [entry.key for entry in store.list()] == ["run-2/a"]


def test_wrong_credentials_fail_at_once_and_name_the_secret(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = Store(Storage(uri="s3://finetune", endpoint=endpoint), secret_name="my-storage")
    begun = time.monotonic()
    with pytest.raises(RunFailure, match="answered SignatureDoesNotMatch.*in Secret 'my-storage'") as caught:
        store.list()
    assert caught.value.reason == "StorageUnauthorized"
    assert time.monotonic() - begun < 5


def test_half_a_secret_is_named(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RunFailure, match="needs both keys"):
        Store(Storage(uri="s3://finetune", endpoint=endpoint))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_unreachable_server_is_waited_for_visibly_and_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING), pytest.raises(RunFailure) as caught:
        Store(Storage(uri="s3://finetune", endpoint=endpoint), wait_seconds=2).put_bytes("x", b"y")
    assert caught.value.reason == "StorageUnavailable"
    assert f"writing s3://finetune/x: {endpoint} did not answer for 2 s" in caught.value.message
    assert "trying again for 2 s more" in caplog.text


def test_work_goes_on_when_the_server_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")  # the server below sets them; monkeypatch restores the session's
    with minio_server(tmp_path / "minio") as endpoint:
        store = Store(Storage(uri="s3://finetune", endpoint=endpoint), wait_seconds=30)
        store.put_bytes("before", b"x")
        server = subprocess.run(
            ["pgrep", "-f", f"address {endpoint.removeprefix('http://')}"], check=True, capture_output=True, text=True
        )
        pid = int(server.stdout.split()[0])
        subprocess.run(["kill", "-STOP", str(pid)], check=True)
        threading.Timer(1, lambda: subprocess.run(["kill", "-CONT", str(pid)], check=False)).start()
        store.put_bytes("after", b"y")
        assert store.get_bytes("after") == b"y"
