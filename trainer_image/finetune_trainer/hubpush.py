"""A folder into a repository on the Hugging Face hub, or on whatever HF_ENDPOINT names: one commit, read back."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from finetune_trainer import hub
from finetune_trainer.digest import MANIFEST, hash_file
from finetune_trainer.failures import UPLOAD_FAILED, RunFailure

log = logging.getLogger(__name__)


def push(repo: str, folder: Path, digest: str, private: bool, token: str, message: str) -> str:
    """The commit that holds the folder's files; the repository is created when it does not exist.

    Nothing is pushed when the repository's manifest says that it holds `digest` already. Files of others in the
    repository stay. Raises: RunFailure, naming output.hub.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    constants.HF_HUB_DISABLE_XET = True  # git LFS over HTTP is what every hub speaks, Xet only huggingface.co
    api = HfApi(endpoint=hub.endpoint(), token=token or False)
    with hub.explained_push(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        commit = str(api.model_info(repo).sha)
        if _holds(api, repo, commit, digest, folder.with_name("held")):
            log.info("hub: %s holds %s already, in commit %s", repo, digest, commit)
        else:
            paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            log.info("hub: pushing %d files to %s at %s", len(paths), repo, hub.endpoint())
            operations = [CommitOperationAdd(path, folder / path) for path in paths]
            commit = api.create_commit(repo, operations, commit_message=message).oid
        _read_back(api, repo, commit, folder)
    log.info("hub: %s@%s", repo, commit)
    return commit


def _holds(api: Any, repo: str, commit: str, digest: str, scratch: Path) -> bool:
    from huggingface_hub import errors

    try:
        path = api.hf_hub_download(repo, MANIFEST, revision=commit, local_dir=scratch)
        return bool(json.loads(Path(path).read_bytes()).get("digest") == digest)
    except (errors.EntryNotFoundError, ValueError, AttributeError):
        return False


def _read_back(api: Any, repo: str, commit: str, folder: Path) -> None:
    """Every file in the commit is the one in the folder, by the hub's own checksums."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    stored = {entry.path: entry for entry in api.get_paths_info(repo, paths, revision=commit)}
    wrong = [path for path in sorted(paths) if not _same(folder / path, stored.get(path))]
    if wrong:
        raise RunFailure(
            UPLOAD_FAILED,
            f"output.hub: {wrong[0]} in {repo}@{commit} is not what was pushed ({len(wrong)} such files)",
        )


def _same(path: Path, entry: Any) -> bool:
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs:
        return bool(entry.lfs.sha256 == hash_file(path)[0])
    blob = hashlib.sha1(b"blob %d\0" % entry.size + path.read_bytes(), usedforsecurity=False)
    return bool(entry.blob_id == blob.hexdigest())
