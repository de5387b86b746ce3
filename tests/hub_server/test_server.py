"""The fake hub answers the real client libraries as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from tests.hub_server.server import HubServer

WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "hub"
    files = {
        "models/acme/tiny/config.json": b'{"model_type": "llama"}',
        "models/acme/tiny/model.safetensors": WEIGHTS,
        "models/acme/tiny@v1/config.json": b'{"model_type": "gpt2"}',
        "models/acme/gated/config.json": b"{}",
        "models/acme/secret/config.json": b"{}",
        "datasets/acme/facts/data/train.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
        "datasets/acme/facts/data/test.jsonl": b'{"text": "three"}\n',
        "hub.json": json.dumps(
            {
                "tokens": {"hf_member": ["acme/gated", "acme/secret"], "hf_stranger": []},
                "gated": ["acme/gated"],
                "private": ["acme/secret"],
            }
        ).encode(),
    }
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


@pytest.fixture
def hub(root: Path) -> Iterator[HubServer]:
    with HubServer(root) as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url)


def test_a_revision_name_resolves_to_the_commit_of_its_files(api: HfApi) -> None:
    main, tagged = api.model_info("acme/tiny"), api.model_info("acme/tiny", revision="v1")
    assert main.sha != tagged.sha
    assert api.model_info("acme/tiny", revision=main.sha).sha == main.sha
    assert [s.rfilename for s in main.siblings or []] == ["config.json", "model.safetensors"]


def test_a_changed_file_is_another_commit(api: HfApi, root: Path) -> None:
    before = api.model_info("acme/tiny").sha
    (root / "models/acme/tiny/config.json").write_text("{}")
    assert api.model_info("acme/tiny").sha != before


def test_a_snapshot_is_the_files_byte_for_byte(hub: HubServer, tmp_path: Path) -> None:
    folder = Path(snapshot_download("acme/tiny", endpoint=hub.url, cache_dir=tmp_path / "cache"))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.name == HfApi(endpoint=hub.url).model_info("acme/tiny").sha


def test_a_snapshot_of_a_tag_is_that_tag(hub: HubServer, tmp_path: Path) -> None:
    folder = snapshot_download("acme/tiny", revision="v1", endpoint=hub.url, local_dir=tmp_path / "v1")
    assert "gpt2" in (Path(folder) / "config.json").read_text()


def test_large_files_are_listed_with_their_sha256(api: HfApi) -> None:
    (info,) = api.get_paths_info("acme/tiny", ["model.safetensors"])
    assert isinstance(info, RepoFile)
    assert info.lfs is not None
    assert (info.size, info.lfs.size) == (len(WEIGHTS), len(WEIGHTS))
    assert info.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_the_tree_is_listed_by_folder(api: HfApi) -> None:
    top = [entry.path for entry in api.list_repo_tree("acme/facts", repo_type="dataset")]
    everything = [entry.path for entry in api.list_repo_tree("acme/facts", repo_type="dataset", recursive=True)]
    assert top == ["data"]
    assert everything == ["data", "data/test.jsonl", "data/train.jsonl"]


def test_a_range_is_read_through_the_file_system(hub: HubServer) -> None:
    with HfFileSystem(endpoint=hub.url).open("acme/tiny/model.safetensors", block_size=1000) as file:
        file.seek(50_000)
        assert file.read(256) == WEIGHTS[50_000:50_256]


def test_a_missing_repository_revision_and_file_are_three_errors(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("acme/tiny", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("acme/tiny", "none.json", endpoint=hub.url, cache_dir=tmp_path)


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_stranger", 403)])
def test_a_gated_repository_refuses_its_files(hub: HubServer, tmp_path: Path, token: str | bool, status: int) -> None:
    with pytest.raises(GatedRepoError) as refused:
        hf_hub_download("acme/gated", "config.json", endpoint=hub.url, cache_dir=tmp_path, token=token)
    assert refused.value.response.status_code == status


def test_a_gated_repository_opens_for_an_authorised_token(hub: HubServer, tmp_path: Path) -> None:
    assert Path(
        hf_hub_download("acme/gated", "config.json", endpoint=hub.url, cache_dir=tmp_path, token="hf_member")
    ).exists()


def test_a_private_repository_looks_missing_to_others(api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/secret", token="hf_stranger")
    assert api.model_info("acme/secret", token="hf_member").private


def test_an_unknown_token_is_refused_everywhere(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError) as refused:
        api.model_info("acme/tiny", token="hf_wrong")
    assert refused.value.response.status_code == 401
    assert not isinstance(refused.value, RepositoryNotFoundError)


def test_whoami_names_the_token_s_owner(api: HfApi) -> None:
    assert api.whoami(token="hf_member")["name"] == "hf_member"


def test_load_dataset_reads_the_splits(hub: HubServer, tmp_path: Path) -> None:
    """The datasets library fixes its endpoint when it is imported, so it gets a process of its own."""
    program = (
        "import datasets, sys; print({k: list(v['text']) for k, v in datasets.load_dataset('acme/facts').items()})"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "{'train': ['one', 'two'], 'test': ['three']}" in done.stdout
