"""Where datasets come from: each kind of source becomes files on disk, under the names that the user knows them by."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Literal

from finetune_operator.api.dataset import DatasetSource, HuggingFaceDataset
from finetune_trainer.data.rows import DataFile
from finetune_trainer.failures import DATASET_NOT_FOUND, RunFailure
from finetune_trainer.sources import hub
from finetune_trainer.sources.datafiles import data_files, files_at
from finetune_trainer.sources.fetch import download
from finetune_trainer.storage.connection import ObjectNotFound
from finetune_trainer.storage.store import PARALLEL, Store

log = logging.getLogger(__name__)

Role = Literal["train", "evaluation"]
MOUNTS = Path("/data")  # configMaps and volumes: /data/train, /data/evaluation


def fetch(source: DatasetSource, role: Role, store: Store, directory: Path, mounts: Path = MOUNTS) -> list[DataFile]:
    """The files of a dataset source, downloaded to `directory` where they are not mounted."""
    directory.mkdir(parents=True, exist_ok=True)
    field = f"dataset.{role}"
    if source.s3:
        return _s3(source.s3.uri, f"{field}.s3.uri", store, directory)
    if source.config_map:
        path = mounts / role / source.config_map.key
        if not path.is_file():
            raise RunFailure(
                DATASET_NOT_FOUND,
                f"{field}.configMap: ConfigMap {source.config_map.name} has no key {source.config_map.key!r}",
            )
        return [DataFile(path, source.config_map.key)]
    if source.persistent_volume_claim:
        claim = source.persistent_volume_claim
        return _local(_mounted(mounts / role, claim.path), f"{field}.persistentVolumeClaim.path", claim.path or "/")
    if source.http:
        name = PurePosixPath(source.http.url.partition("?")[0]).name or "download"
        path = directory / "download"
        download(source.http.url, source.http.sha256, path, f"{field}.http.url")
        return [DataFile(path, name)]
    if source.hugging_face:
        return [_hub(source.hugging_face, role, directory)]
    raise RunFailure(
        DATASET_NOT_FOUND,
        f"{field} names no source: set one of s3, huggingFace, persistentVolumeClaim, configMap, http",
    )


def _s3(uri: str, field: str, store: Store, directory: Path) -> list[DataFile]:
    folder, _, name = uri.rstrip("/").rpartition("/")
    try:
        if folder.removeprefix("s3://"):  # s3://bucket/file: one object
            parent = store.at(folder)
            if not uri.endswith("/") and parent.exists(name):
                parent.get_file(name, directory / "object")
                return [DataFile(directory / "object", name)]
        place = store.at(uri)
        listed = {entry.key: entry for entry in place.list()}
    except ObjectNotFound as error:
        raise RunFailure(DATASET_NOT_FOUND, f"{field}: there is no bucket for {uri} on {store.endpoint}") from error
    chosen = data_files([key for key, entry in listed.items() if entry.size])
    if not chosen:
        raise RunFailure(DATASET_NOT_FOUND, f"{field}: there is nothing at {uri} on {store.endpoint}")
    files = [DataFile(directory / f"object-{number:05d}", key) for number, key in enumerate(chosen)]
    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        list(pool.map(lambda file: place.get_file(file.name, file.path), files))
    return files


def _mounted(mount: Path, path: str) -> Path:
    """A path on a mounted volume; nothing outside it."""
    target = (mount / path.strip("/")).resolve()
    return target if target.is_relative_to(mount.resolve()) else mount / "outside-the-volume"


def _local(path: Path, field: str, shown: str) -> list[DataFile]:
    if not (found := files_at(path)):
        raise RunFailure(DATASET_NOT_FOUND, f"{field}: there are no files at {shown} on the volume")
    return found


def _hub(source: HuggingFaceDataset, role: Role, directory: Path) -> DataFile:
    """A split of a hub dataset, as one parquet file."""
    token = os.environ.get(f"FINETUNE_{role.upper()}_HF_TOKEN") or None
    field = f"dataset.{role}.huggingFace"
    os.environ.setdefault("HF_DATASETS_CACHE", str(directory / "cache"))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with hub.explained("dataset", source.repo, source.revision, token, role):
        from datasets import disable_progress_bars, load_dataset
        from huggingface_hub import HfApi

        disable_progress_bars()
        commit = HfApi(token=token or False).dataset_info(source.repo, revision=source.revision).sha
        log.info("dataset: %s at %s", source.repo, commit)
        try:
            rows = load_dataset(source.repo, source.subset, split=source.split, revision=commit, token=token or False)
        except ValueError as error:  # unknown subset or split: the client says which there are
            raise RunFailure(DATASET_NOT_FOUND, f"{field}: {source.repo}: {error}") from error
        path = directory / "hub.parquet"
        rows.to_parquet(path)
    return DataFile(path, f"{source.repo}/{source.split}")
