"""The base model: which files, at which digest, and how each Job gets them.

prepare resolves it once: a hub model is mirrored into the bucket by commit, a model in S3 or on a volume is used where
it is. Its digest covers every file; the list is kept at models/<digest>/manifest.json, so that whoever downloads the
model can check it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from finetune_operator.api.common import BaseModelSource, HuggingFaceModel
from finetune_operator.api.finetunestatus import BaseModelStatus
from finetune_trainer import digest as digests
from finetune_trainer.failures import BASE_MODEL_NOT_FOUND, DIGEST_MISMATCH, UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.sources import hub, modelfiles
from finetune_trainer.storage.connection import ObjectNotFound
from finetune_trainer.storage.store import Store

log = logging.getLogger(__name__)

MOUNT = Path("/data/base-model")
_FORMAT = 1  # of the cached lists in the bucket


class Resolved(NamedTuple):
    """A base model whose digest is known, and a folder with its config and tokenizer."""

    status: BaseModelStatus
    directory: Path


def resolve(
    source: BaseModelSource, store: Store, directory: Path, mount: Path = MOUNT, here: Path | None = None
) -> Resolved:
    """Resolve the base model of a FineTune; weights are hashed but not kept. `here`: a folder to use in its place."""
    directory.mkdir(parents=True, exist_ok=True)
    if here:
        return _from_folder(here.resolve(), str(here), store, source.trust_remote_code, revision="")
    if source.s3:
        return _from_s3(source.s3.uri, store, directory, source.trust_remote_code)
    if source.persistent_volume_claim:
        return _from_volume(mount, source.persistent_volume_claim.path, store, source.trust_remote_code)
    if source.hugging_face:
        return _from_hub(source.hugging_face, store, directory, source.trust_remote_code)
    raise RunFailure(
        BASE_MODEL_NOT_FOUND, "baseModel names no source: set one of huggingFace, s3, persistentVolumeClaim"
    )


def download(
    store: Store, status: BaseModelStatus, directory: Path, on_bytes: Callable[[int], None] = lambda count: None
) -> Path:
    """The folder of a resolved base model, every file checked: downloaded to `directory`, or the volume where it is
    mounted.
    """
    manifest = _manifest(store, status.digest)
    if status.uri.startswith("file://"):
        path = folder_of(status, directory)
        _check_folder(path, manifest)
        return path
    if manifest is None:
        raise RunFailure(
            BASE_MODEL_NOT_FOUND,
            f"base model {status.digest} has no list of files in {store.uri('models')}: start a new run",
        )
    store.at(status.uri).download_tree("", directory, status.digest, manifest=manifest, on_bytes=on_bytes)
    return directory


def license_of(store: Store, digest: str) -> str | None:
    """The licence that the hub named when the model was mirrored."""
    manifest = _manifest(store, digest) or {}
    license = manifest.get("license")
    return license if isinstance(license, str) else None


def folder_of(status: BaseModelStatus, directory: Path) -> Path:
    """Where `download` puts a base model: `directory`, unless it is on a volume."""
    return Path(status.uri.removeprefix("file://")) if status.uri.startswith("file://") else directory


def _manifest(store: Store, digest: str) -> dict[str, Any] | None:
    return store.manifest(f"models/{digests.hex_of(digest)}")


def _record(store: Store, files: list[digests.File], uri: str) -> str:
    """Keep the list of a model's files in the bucket; returns the digest."""
    manifest = digests.manifest_of(files, uri=uri)
    key = f"models/{digests.hex_of(manifest['digest'])}/{digests.MANIFEST}"
    if not store.exists(key):
        store.put_json(key, manifest)
    return str(manifest["digest"])


def _refuse(what: str, lack: str) -> RunFailure:
    reason = UNSUPPORTED_COMBINATION if "pickle" in lack else BASE_MODEL_NOT_FOUND
    return RunFailure(reason, f"{what} {lack}")


# s3


def _from_s3(uri: str, store: Store, directory: Path, remote_code: bool) -> Resolved:
    place = store.at(uri)
    try:
        objects = {entry.key: entry for entry in place.list()}
    except ObjectNotFound as error:
        raise RunFailure(
            BASE_MODEL_NOT_FOUND, f"baseModel.s3.uri: there is no bucket for {uri} on {store.endpoint}"
        ) from error
    if lack := modelfiles.missing(objects) if objects else "is empty or does not exist":
        raise _refuse(f"baseModel.s3.uri: {uri} on {store.endpoint}", lack)
    chosen = modelfiles.model_files(objects, remote_code)
    # the content is read once: ETags change with it
    state = digests.sha256_hex(
        digests.canonical_json([_FORMAT, uri, *([name, objects[name].size, objects[name].etag] for name in chosen)])
    )
    cache = f"models/known/{state}.json"
    known = store.get_json(cache)
    if known is None:
        files = _hash_objects(place, [objects[name] for name in chosen])
        known = {
            "files": [file._asdict() for file in files],
            "parameters": modelfiles.parameters(
                chosen, lambda name, offset, length: place.get_range(name, offset, length)
            ),
        }
        store.put_json(cache, known)
    files = [digests.File(**file) for file in known["files"]]
    digest = _record(store, files, uri)
    small = [file for file in files if not modelfiles.is_weights(file.path)]
    place.download_tree("", directory, manifest=digests.manifest_of(small))
    return Resolved(_status(digests.short(digest), digest, uri, known["parameters"]), directory)


def _hash_objects(place: Store, objects: list[Any]) -> list[digests.File]:
    total, done, begun = sum(entry.size for entry in objects), 0, time.monotonic()
    files = []
    for entry in objects:
        files.append(place.hash_object(entry.key, entry.key))
        done += entry.size
        if total > 1 << 30:
            speed = done / (time.monotonic() - begun) / 1e6
            log.info(
                "base model: hashed %.1f of %.1f GB (%.0f MB/s); next time this is known",
                done / 1e9,
                total / 1e9,
                speed,
            )
    return files


# volumes


def _from_volume(mount: Path, path: str, store: Store, remote_code: bool) -> Resolved:
    folder = (mount / path.strip("/")).resolve()
    if not folder.is_relative_to(mount.resolve()) or not folder.is_dir():
        raise RunFailure(
            BASE_MODEL_NOT_FOUND,
            f"baseModel.persistentVolumeClaim.path: there is no folder {path or '/'} on the volume",
        )
    return _from_folder(folder, f"baseModel.persistentVolumeClaim.path: {path or '/'}", store, remote_code)


def _from_folder(folder: Path, what: str, store: Store, remote_code: bool, revision: str | None = None) -> Resolved:
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    if lack := modelfiles.missing(names):
        raise _refuse(what, lack)
    chosen = modelfiles.model_files(names, remote_code)
    log.info("base model: hashing %d files in %s", len(chosen), folder)
    files = [digests.File(name, *digests.hash_file(folder / name)) for name in chosen]
    digest = _record(store, files, f"file://{folder}")
    count = modelfiles.parameters(chosen, lambda name, offset, length: _read(folder / name, offset, length))
    known = digests.short(digest) if revision is None else revision
    return Resolved(_status(known, digest, f"file://{folder}", count), folder)


def _check_folder(path: Path, manifest: dict[str, Any] | None) -> None:
    for file in digests.files_of(manifest) if manifest else []:
        here = path / file.path
        if not here.is_file() or here.stat().st_size != file.size:
            raise RunFailure(
                DIGEST_MISMATCH,
                f"baseModel: {file.path} in {path} changed since the run was prepared; start a new run",
            )


def _read(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as source:
        source.seek(offset)
        return source.read(length)


# the hub


def _from_hub(source: HuggingFaceModel, store: Store, directory: Path, remote_code: bool) -> Resolved:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    token = os.environ.get("FINETUNE_BASE_MODEL_HF_TOKEN") or None
    with hub.explained("base model", source.repo, source.revision, token):
        info = HfApi(token=token or False).model_info(source.repo, revision=source.revision, files_metadata=True)
        commit = info.sha or source.revision
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        log.info("base model: %s at %s", source.repo, commit)

        def fetch(name: str) -> Path:
            return Path(hf_hub_download(source.repo, name, revision=commit, local_dir=directory, token=token or False))

        if modelfiles.CONFIG in siblings:
            fetch(modelfiles.CONFIG)  # a gated repository lists its files to everyone: only reading one tells
        if lack := modelfiles.missing(siblings):
            raise _refuse(f"baseModel.huggingFace: {source.repo} at {commit[:12]}", lack)
        identity = [_FORMAT, hub.endpoint(), source.repo, commit, remote_code]
        mark = f"models/known/{digests.sha256_hex(digests.canonical_json(identity))}.json"
        known = store.get_json(mark)
        prefix = f"models/{digests.hex_of(known['digest'])}" if known else ""
        if known and (manifest := store.verify_tree(prefix)):
            log.info("base model: %s is mirrored already at %s", source.repo, store.uri(prefix))
            small = [file for file in digests.files_of(manifest) if not modelfiles.is_weights(file.path)]
            store.download_tree(prefix, directory, manifest=digests.manifest_of(small))
        else:
            listed = {}
            for name in modelfiles.model_files(siblings, remote_code):
                lfs = siblings[name].lfs
                listed[name] = digests.File(name, lfs.sha256, lfs.size) if lfs and lfs.sha256 else None
            license = getattr(info.card_data, "license", None)
            origin = {"repo": source.repo, "revision": commit, **({"license": license} if license else {})}
            known = _mirror(store, listed, fetch, origin)
            store.put_json(mark, known)
    prefix = f"models/{digests.hex_of(known['digest'])}"
    return Resolved(_status(commit, known["digest"], store.uri(prefix), known["parameters"]), directory)


def _mirror(
    store: Store, listed: dict[str, digests.File | None], fetch: Callable[[str], Path], origin: dict[str, str]
) -> dict[str, Any]:
    """Copy a hub model's files into the bucket, the manifest last; gives its digest and number of parameters.

    `listed`: what the hub says of each file. With the SHA-256 of the weights known, the digest and so the folder are
    known before they are fetched, and only one of them needs to be on disk at a time.
    """
    files = [
        file if file and modelfiles.is_weights(name) else digests.File(name, *digests.hash_file(fetch(name)))
        for name, file in listed.items()
    ]
    digest, parameters = digests.tree_digest(files), 0
    prefix = f"models/{digests.hex_of(digest)}"
    for file in files:
        begun, path = time.monotonic(), fetch(file.path)
        if digests.hash_file(path) != (file.sha256, file.size):
            raise RunFailure(
                DIGEST_MISMATCH,
                f"baseModel.huggingFace: {file.path} of {origin['repo']} is not what the hub lists: try again",
            )
        store.put_file(f"{prefix}/{file.path}", path)
        if modelfiles.is_weights(file.path):
            parameters += modelfiles.parameters([file.path], partial(_read_of, path))
            path.unlink()
            seconds = time.monotonic() - begun
            log.info("base model: mirrored %s (%.0f MB in %.0f s)", file.path, file.size / 1e6, seconds)
    store.put_json(f"{prefix}/{digests.MANIFEST}", digests.manifest_of(files, **origin))
    return {"digest": digest, "parameters": parameters}


def _read_of(path: Path, _: str, offset: int, length: int) -> bytes:
    return _read(path, offset, length)


def _status(revision: str, digest: str, uri: str, parameters: int) -> BaseModelStatus:
    return BaseModelStatus(revision=revision, digest=digest, uri=uri, parameters=parameters)
