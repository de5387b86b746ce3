"""The base model as serving gets it: by the list that prepare recorded, by its own, or as it lies in its folder."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from finetune_trainer.digest import hex_of, manifest_of
from finetune_trainer.failures import BASE_MODEL_NOT_FOUND, RunFailure
from finetune_trainer.sources.modelfiles import missing, model_files
from finetune_trainer.storage.connection import ObjectNotFound
from finetune_trainer.storage.store import PARALLEL, Store

log = logging.getLogger(__name__)


class ServedBase(NamedTuple):
    """A base model on this pod's disk, and the digest of what is there."""

    path: Path
    digest: str


def fetch(store: Store, uri: str, digest: str, directory: Path) -> ServedBase:
    """The base model: a mounted volume is used where it is, S3 is downloaded and verified.

    `digest` may be empty where nobody knows it yet. RunFailure when there is no model, or another one.
    """
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return ServedBase(Path(parts.path), digest)
    source = store.at(uri)
    manifest = file_list(store, source, digest)
    total = sum(int(file["size"]) for file in manifest["files"])
    log.info("base model: downloading %s (%d files, %.1f MB)", uri, len(manifest["files"]), total / 1e6)
    source.download_tree("", directory, digest or None, manifest)
    log.info("base model: verified, %s", manifest["digest"])
    return ServedBase(directory, str(manifest["digest"]))


def file_list(store: Store, source: Store, digest: str) -> dict[str, Any]:
    """The manifest recorded by a prepare Job, or beside the model, else made from the folder's content."""
    recorded = store.manifest(f"models/{hex_of(digest)}") if digest else None
    if manifest := recorded or source.manifest(""):
        return manifest
    try:
        present = [entry.key for entry in source.list()]
    except ObjectNotFound:
        present = []
    if lack := missing(present) if present else "is empty or does not exist: spec.baseModel must name its folder":
        raise RunFailure(BASE_MODEL_NOT_FOUND, f"{source.uri()} {lack}")
    names = model_files(present)
    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        return manifest_of(pool.map(lambda name: source.hash_object(name, name), names))
