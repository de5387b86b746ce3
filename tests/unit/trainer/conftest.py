"""A MinIO for the session and a tiny model, shared by the trainer's tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.results.tracking import follow

from .minio_server import minio_binary, minio_server

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker that answers is waited for on a slow machine too."""
    monkeypatch.setattr(follow, "PATIENCE", dict.fromkeys(follow.PATIENCE, 120.0))


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MinIO with the bucket `finetune`."""
    if minio_binary() is None:
        pytest.skip("no minio binary: run `make tools`")
    with minio_server(tmp_path_factory.mktemp("minio")) as url:
        yield url


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .tiny import make_llama

    return make_llama(tmp_path_factory.mktemp("tiny-llama"))
