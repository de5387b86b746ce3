"""What spec.output.hub pushes, by the real client to the fake hub: one commit, read back, with errors that name the field."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, snapshot_download

from finetune_trainer.digest import hash_tree, manifest_of, tree_digest
from finetune_trainer.failures import RunFailure
from finetune_trainer.results.hubpush import push
from tests.hub_server.server import HubServer

CARD = "---\nlibrary_name: peft\ntags:\n- finetune-operator\n---\n\n# bot\n"
TOKENS = {"tokens": {"hf_writer": [], "hf_reader": []}, "writers": {"hf_writer": ["acme"]}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    root = tmp_path / "hub"
    (root / "models").mkdir(parents=True)
    (root / "hub.json").write_text(json.dumps(TOKENS))
    with HubServer(root) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as export lays it out."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 50)
    (folder / "manifest.json").write_text(json.dumps(manifest_of(hash_tree(folder))))
    return folder


def digest_of(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text())["digest"])


def push_it(folder: Path, repo: str = "acme/bot", token: str = "hf_writer", private: bool = True) -> str:
    return push(repo, folder, digest_of(folder), private, token, "run 1")


def test_the_repository_holds_the_files_under_the_same_digest(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    commit = push_it(folder)
    got = Path(
        snapshot_download("acme/bot", revision=commit, endpoint=hub.url, local_dir=tmp_path / "got", token="hf_writer")
    )
    files = [file for file in hash_tree(got) if not file.path.startswith((".cache", "manifest.json"))]
    assert tree_digest(files) == digest_of(folder)
    assert ModelCard.load(got / "README.md").data.library_name == "peft"


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_private_unless_asked_otherwise(hub: HubServer, folder: Path, private: bool) -> None:
    push_it(folder, private=private)
    assert HfApi(endpoint=hub.url, token="hf_writer").model_info("acme/bot").private is private


def test_what_the_repository_holds_already_is_not_pushed_again(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    first = push_it(folder)
    theirs = tmp_path / "hub/models/acme/bot/NOTES.md"
    theirs.write_text("added by a person")
    second = push_it(folder)
    assert second != first, "the commit that is there now"
    assert theirs.exists()


def test_a_file_that_is_gone_from_the_repository_is_pushed_again(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push_it(folder)
    theirs = tmp_path / "hub/models/acme/bot/adapter_config.json"
    theirs.unlink()
    push_it(folder)
    assert theirs.read_text() == "{}"


@pytest.mark.parametrize(("moment", "there"), [("preupload_lfs_files", False), ("create_commit", True)])
def test_a_push_that_was_killed_is_finished_by_the_next_one(
    hub: HubServer, folder: Path, tmp_path: Path, moment: str, there: bool
) -> None:
    """Killed with the large file sent and not committed, and with everything committed and nobody told."""
    child = subprocess.run([sys.executable, "-c", KILLED, folder, digest_of(folder), moment], check=False)
    assert child.returncode == -signal.SIGKILL
    repository = tmp_path / "hub/models/acme/bot"
    assert (repository / "adapter_model.safetensors").exists() is there
    before = HfApi(endpoint=hub.url, token="hf_writer").model_info("acme/bot").sha
    commit = push_it(folder)
    assert (commit == before) is there, "what was committed is not pushed twice"
    got = snapshot_download(
        "acme/bot", revision=commit, local_dir=tmp_path / "got", endpoint=hub.url, token="hf_writer"
    )
    files = [file for file in hash_tree(Path(got)) if not file.path.startswith((".cache", "manifest.json"))]
    assert tree_digest(files) == digest_of(folder)


KILLED = """
import os, signal, sys
from pathlib import Path
from huggingface_hub import HfApi
from finetune_trainer.results.hubpush import push

folder, digest, moment = sys.argv[1:]
call = getattr(HfApi, moment)

def last(*arguments, **options):
    call(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(HfApi, moment, last)
push("acme/bot", Path(folder), digest, True, "hf_writer", "run 1")
"""


def test_a_newer_adapter_is_a_commit_in_the_same_repository(hub: HubServer, folder: Path) -> None:
    first = push_it(folder)
    (folder / "manifest.json").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"newer")
    (folder / "manifest.json").write_text(json.dumps(manifest_of(hash_tree(folder))))
    assert push_it(folder) != first


def test_a_merged_model_takes_the_place_of_the_adapter_and_leaves_the_files_of_others(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    push_it(folder)
    held = tmp_path / "hub/models/acme/bot"
    (held / "NOTES.md").write_text("added by a person")
    (held / "adapter_config.json").unlink()  # taken away by a person: nothing to delete
    for name in ("adapter_model.safetensors", "adapter_config.json", "manifest.json"):
        (folder / name).unlink()
    (folder / "model.safetensors").write_bytes(b"merged")
    (folder / "manifest.json").write_text(json.dumps(manifest_of(hash_tree(folder))))
    push_it(folder)
    names = {path.name for path in held.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert names == {"README.md", "NOTES.md", "model.safetensors", "manifest.json"}


@pytest.mark.parametrize(
    ("token", "status"), [("hf_reader", "403"), ("hf_unknown", "401"), ("", "401")], ids=["reader", "unknown", "none"]
)
def test_a_token_that_may_not_write_is_named_by_field(hub: HubServer, folder: Path, token: str, status: str) -> None:
    with pytest.raises(RunFailure, match=rf"output.hub: .* answered {status} for acme/bot .*tokenSecretRef") as refused:
        push_it(folder, token=token)
    assert refused.value.reason == "HubUnauthorized"
    assert token not in refused.value.message or not token


def test_a_hub_that_is_not_there_is_tried_again_by_the_operator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunFailure, match="output.hub: http://127.0.0.1:9 cannot be reached for acme/bot") as refused:
        push_it(folder)
    assert refused.value.reason == "HubUnavailable"


def test_a_file_that_the_hub_changed_on_the_way_is_a_failure(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.hub_server import server

    monkeypatch.setattr(server.base64, "b64decode", lambda text: b"something else")
    with pytest.raises(RunFailure, match="README.md in acme/bot@.* is not what was pushed") as wrong:
        push_it(folder)
    assert wrong.value.reason == "UploadFailed"
