"""A folder into a repository on the Hugging Face hub, or on whatever HF_ENDPOINT names: one commit, read back."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from finetune_trainer.digest import MANIFEST, files_of, hash_file
from finetune_trainer.failures import UPLOAD_FAILED, RunFailure
from finetune_trainer.sources import hub

log = logging.getLogger(__name__)


def push(repo: str, folder: Path, digest: str, private: bool, token: str, message: str) -> str:
    """The commit that holds the folder's files; the repository is created when it does not exist.

    Nothing is pushed when the repository holds every file already. What an earlier push has left and this one has not
    goes, or a repository would hold two models; files of others stay. Raises: RunFailure, naming output.hub.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    constants.HF_HUB_DISABLE_XET = True  # git LFS over HTTP is what every hub speaks, Xet only huggingface.co
    api = HfApi(endpoint=hub.endpoint(), token=token or False)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with hub.explained_push(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        commit = str(api.model_info(repo).sha)
        if not _wrong(api, repo, commit, folder, paths):
            log.info("hub: %s holds %s already, in commit %s", repo, digest, commit)
            return commit
        log.info("hub: pushing %d files to %s at %s", len(paths), repo, hub.endpoint())
        before = _pushed_before(api, repo, commit, folder.with_name("held"))
        stale = sorted((before - set(paths)) & set(api.list_repo_files(repo, revision=commit)))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path, folder / path) for path in paths),
            *(CommitOperationDelete(path) for path in stale),
        ]
        commit = api.create_commit(repo, operations, commit_message=message).oid
        if wrong := _wrong(api, repo, commit, folder, paths):
            raise RunFailure(
                UPLOAD_FAILED,
                f"output.hub: {wrong[0]} in {repo}@{commit} is not what was pushed ({len(wrong)} such files)",
            )
    log.info("hub: %s@%s", repo, commit)
    return commit


def _pushed_before(api: Any, repo: str, commit: str, scratch: Path) -> set[str]:
    """The files that the manifest of an earlier push lists."""
    from huggingface_hub import errors

    try:
        path = api.hf_hub_download(repo, MANIFEST, revision=commit, local_dir=scratch)
        return {file.path for file in files_of(json.loads(Path(path).read_bytes()))}
    except (errors.EntryNotFoundError, ValueError, TypeError, KeyError):
        return set()


def _wrong(api: Any, repo: str, commit: str, folder: Path, paths: list[str]) -> list[str]:
    """The files that are not in the commit as they are in the folder, by the hub's own checksums."""
    stored = {entry.path: entry for entry in api.get_paths_info(repo, paths, revision=commit)}
    return [path for path in paths if not _same(folder / path, stored.get(path))]


def _same(path: Path, entry: Any) -> bool:
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs:
        return bool(entry.lfs.sha256 == hash_file(path)[0])
    blob = hashlib.sha1(b"blob %d\0" % entry.size + path.read_bytes(), usedforsecurity=False)
    return bool(entry.blob_id == blob.hexdigest())
