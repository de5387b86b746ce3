"""The object store against a real MinIO: trees with manifests, verification, and what happens when the server is gone."""

import logging
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import urllib3

from finetune_trainer.failures import RunFailure
from finetune_trainer.runspec import Storage
from finetune_trainer.storage import store as store_module
from finetune_trainer.storage.connection import Patience
from finetune_trainer.storage.store import ObjectNotFound, Store

from .minio_server import minio_server


@pytest.fixture
def store(endpoint: str, tmp_path: Path) -> Store:
    return Store(Storage(uri=f"s3://finetune/{tmp_path.name}", endpoint=endpoint), wait_seconds=2)


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


def test_in_a_bucket_that_is_not_there_nothing_is_found(store: Store) -> None:
    with pytest.raises(ObjectNotFound):
        store.at("s3://no-such-bucket").list()


def test_wrong_credentials_fail_at_once_and_name_the_secret(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = Store(Storage(uri="s3://finetune", endpoint=endpoint), secret_name="my-storage")
    begun = time.monotonic()
    with pytest.raises(RunFailure, match="answered SignatureDoesNotMatch.*in Secret 'my-storage'") as caught:
        store.list()
    assert caught.value.reason == "StorageUnauthorized"
    assert time.monotonic() - begun < 60  # and not the three minutes of an outage


def test_a_clock_that_is_wrong_is_said(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    late = datetime.now(UTC) - timedelta(hours=1)
    monkeypatch.setattr("minio.time.utcnow", lambda: late)
    store = Store(Storage(uri="s3://finetune", endpoint=endpoint), wait_seconds=1)
    with pytest.raises(RunFailure, match=r"RequestTimeTooSkewed.*; set this node's clock"):
        store.list()


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


def test_one_of_several_files_that_wait_says_so_and_all_are_told_of_once_it_answers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    stop, all_wait = threading.Event(), threading.Barrier(3)
    monkeypatch.setattr(stop, "wait", lambda seconds: all_wait.wait())
    patience = Patience("http://minio:9000", 30, "", stop, told.append)
    refused = threading.local()

    def upload() -> str:
        if hasattr(refused, "once"):
            return "done"
        refused.once = True
        raise urllib3.exceptions.HTTPError("refused")

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(3) as pool:
        uploads = [pool.submit(patience.run, f"uploading {name}", "finetune", upload) for name in "abc"]
        assert [upload.result() for upload in uploads] == ["done"] * 3
    (said,) = [text for text in told if text]
    assert "http://minio:9000 does not answer (refused)" in said
    assert told == [said, ""] and len(caplog.records) == 1


def test_the_wait_is_counted_from_the_first_trouble_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stop = 100.0, threading.Event()
    tries: list[float] = []

    def upload() -> str:
        nonlocal now
        now += 500  # how long the file is on its way until the connection breaks
        tries.append(now)
        if len(tries) == 2:
            return "done"
        raise urllib3.exceptions.HTTPError("reset")

    monkeypatch.setattr("finetune_trainer.storage.connection.time.monotonic", lambda: now)
    monkeypatch.setattr(stop, "wait", lambda seconds: False)
    assert Patience("http://minio:9000", 170, "", stop).run("uploading a", "finetune", upload) == "done"


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
