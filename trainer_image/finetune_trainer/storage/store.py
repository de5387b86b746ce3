"""The object store: a thin layer over the minio client that waits out an outage and trusts nothing it has not read
back.

All keys are relative to the store's `s3://bucket/prefix`; `at()` gives the same store at another place. Credentials
come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN). Every error leaves as a
RunFailure. `file:///folder` is a store too: that of `finetune run`, on one machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from finetune_trainer import digest as digests
from finetune_trainer import failures
from finetune_trainer.failures import RunFailure
from finetune_trainer.storage.connection import AWS, ObjectNotFound, Patience, connect, full_disk
from finetune_trainer.storage.folder import FolderClient

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

WAIT_SECONDS = 180.0  # of an unreachable server: a node that restarts with a single MinIO takes about two minutes
PARALLEL = 8
_PART = 64 << 20  # upload part; files up to this size are one PUT, whose ETag is the content's MD5
_RANGE = 32 << 20  # download range: several connections per file, or a 5 GB shard waits for one
_CHUNK = 1 << 20


class Place(Protocol):
    """What a Store needs to know: `runspec.Storage` has it."""

    @property
    def uri(self) -> str: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def region(self) -> str: ...


class Object(NamedTuple):
    """One object: key relative to the store's prefix, size in bytes, ETag without quotes."""

    key: str
    size: int
    etag: str


def split_uri(uri: str) -> tuple[str, str]:
    """(bucket, key without slashes around it) of `s3://bucket/key`; the bucket is empty for `file:///folder`."""
    if uri.startswith("file:///"):
        return "", uri.removeprefix("file:///").strip("/")
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc:
        raise RunFailure(failures.STORAGE_UNAVAILABLE, f"{uri!r} is not an s3:// address; write s3://bucket/path")
    return parts.netloc, parts.path.strip("/")


class Store:
    """One bucket and prefix of an S3 server, or one folder. Thread-safe."""

    def __init__(
        self,
        storage: Place,
        *,
        wait_seconds: float = WAIT_SECONDS,
        secret_name: str = "",
        stop: threading.Event | None = None,
        told: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`secret_name`: of the credentials, for messages. `stop`: set it to give up waiting for the server. `told`: is
        told what the server is waited for, and an empty text when it answers again.
        """
        self.endpoint, self._storage = storage.endpoint or AWS, storage
        self.bucket, self.prefix = split_uri(storage.uri)
        self._client: Any = self._connect()  # a Minio, or the FolderClient
        self._patience = Patience(self.endpoint, wait_seconds, secret_name, stop or threading.Event(), told)

    def at(self, uri: str) -> Store:
        """The same server and credentials at another s3:// address."""
        elsewhere = copy(self)
        elsewhere.bucket, elsewhere.prefix = split_uri(uri)
        if bool(elsewhere.bucket) != bool(self.bucket):
            elsewhere._client = elsewhere._connect()
        return elsewhere

    def _connect(self) -> Any:
        return connect(self._storage.endpoint, self._storage.region) if self.bucket else FolderClient()

    def uri(self, key: str = "") -> str:
        """The address of a key: s3://, or file:// in a folder."""
        return f"{'s3' if self.bucket else 'file'}://{self.bucket}/{self._key(key)}".rstrip("/")

    # single objects

    def put_bytes(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        self._patiently(
            f"writing {self.uri(key)}",
            lambda: self._client.put_object(self.bucket, self._key(key), io.BytesIO(data), len(data), content_type),
        )

    def get_bytes(self, key: str) -> bytes:
        """The object's content; ObjectNotFound when there is none."""

        def read() -> bytes:
            with self.open(key) as stream:
                return bytes(stream.read())

        return self._patiently(f"reading {self.uri(key)}", read)

    def put_json(self, key: str, value: Any) -> None:
        sound = digests.without_nan(value)
        text = json.dumps(sound, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self.put_bytes(key, text.encode(), "application/json")

    def get_json(self, key: str) -> Any | None:
        """The parsed object, or None when there is none."""
        try:
            return json.loads(self.get_bytes(key))
        except ObjectNotFound:
            return None
        except ValueError as error:
            raise RunFailure(
                failures.DOWNLOAD_FAILED, f"{self.uri(key)} is not JSON ({error}); delete it and run again"
            ) from error

    def put_file(self, key: str, path: Path) -> None:
        """Upload one file and read its size and checksum back."""

        def put() -> None:
            with open(path, "rb") as source:
                size = os.fstat(source.fileno()).st_size
                self._client.put_object(self.bucket, self._key(key), source, size, part_size=_PART)

        self._patiently(f"uploading {self.uri(key)}", put)
        self._read_back(key, path)

    def get_file(self, key: str, path: Path) -> None:
        """Download one object, in ranges over several connections; ObjectNotFound when there is none."""
        found = self.stat(key)
        if found is None:
            raise ObjectNotFound(f"{self.uri(key)} does not exist")
        path.parent.mkdir(parents=True, exist_ok=True)
        with full_disk(path), open(path, "wb") as target:
            target.truncate(found.size)
        with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
            list(
                pool.map(
                    lambda at: self._fetch_range(key, path, at, min(_RANGE, found.size - at)),
                    range(0, found.size, _RANGE),
                )
            )

    def stat(self, key: str) -> Object | None:
        """Size and ETag of an object, or None when there is none."""
        try:
            found = self._patiently(
                f"looking for {self.uri(key)}", lambda: self._client.stat_object(self.bucket, self._key(key))
            )
        except ObjectNotFound:
            return None
        return Object(key, found.size or 0, (found.etag or "").strip('"'))

    def exists(self, key: str) -> bool:
        return self.stat(key) is not None

    def list(self, prefix: str = "") -> list[Object]:
        """All objects under a folder, sorted by key; ObjectNotFound when the bucket does not exist."""
        base = self._key(prefix)
        base = f"{base}/" if base else ""

        def walk() -> list[Object]:
            found = self._client.list_objects(self.bucket, prefix=base, recursive=True)
            start = len(self.prefix) + 1 if self.prefix else 0
            return [
                Object((entry.object_name or "")[start:], entry.size or 0, (entry.etag or "").strip('"'))
                for entry in found
                if not entry.is_dir
            ]

        return sorted(self._patiently(f"listing s3://{self.bucket}/{base}", walk))

    def delete(self, prefix: str) -> int:
        """Delete an object and everything under it as a folder; returns how many objects that were.

        Manifests go first, so that nothing half-deleted looks whole.
        """
        listed = [entry.key for entry in self.list(prefix)]
        keys = sorted(listed, key=lambda key: (not key.endswith(digests.MANIFEST), key))
        for key in keys or [prefix]:
            remove = partial(self._client.remove_object, self.bucket, self._key(key))
            self._patiently(f"deleting {self.uri(key)}", remove)
        return len(keys)

    @contextmanager
    def open(self, key: str, offset: int = 0, length: int = 0) -> Iterator[Any]:
        """The object's content as a stream, from `offset`, `length` bytes (0: to the end). No waiting: the reader may
        have begun.
        """
        response = self._client.get_object(self.bucket, self._key(key), offset, length)
        try:
            yield response
        finally:
            response.close()
            response.release_conn()

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """`length` bytes of an object from `offset`."""

        def read() -> bytes:
            with self.open(key, offset, length) as stream:
                return bytes(stream.read())

        return self._patiently(f"reading {self.uri(key)}", read)

    def hash_object(self, key: str, path: str) -> digests.File:
        """An object's File entry, its content streamed through sha256 and kept nowhere."""

        def stream() -> digests.File:
            sha, size = hashlib.sha256(), 0
            with self.open(key) as response:
                for chunk in response.stream(_CHUNK):
                    sha.update(chunk)
                    size += len(chunk)
            return digests.File(path, sha.hexdigest(), size)

        return self._patiently(f"hashing {self.uri(key)}", stream)

    # trees of files with a manifest

    def manifest(self, prefix: str) -> dict[str, Any] | None:
        """A folder's manifest.json, or None; DigestMismatch when its files do not hash to the digest it states."""
        key = f"{prefix.rstrip('/')}/{digests.MANIFEST}".lstrip("/")
        manifest = self.get_json(key)
        if manifest is not None:
            try:
                digests.files_of(manifest)
            except (ValueError, KeyError, TypeError) as error:
                raise RunFailure(failures.DIGEST_MISMATCH, f"{self.uri(key)} cannot be trusted: {error}") from error
        return manifest

    def upload_tree(
        self,
        directory: Path,
        prefix: str,
        manifest_extra: dict[str, Any] | None = None,
        files: Iterable[digests.File] | None = None,
    ) -> str:
        """Upload a folder, read every file back, then write manifest.json; returns the digest. Without a manifest it
        does not exist.

        `files`: what `digest.hash_tree(directory)` gave, when the caller has it already.
        """
        listed = sorted(files if files is not None else digests.hash_tree(directory))
        with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
            list(pool.map(lambda file: self.put_file(f"{prefix}/{file.path}", directory / file.path), listed))
        manifest = digests.manifest_of(listed, **(manifest_extra or {}))
        self.put_json(f"{prefix}/{digests.MANIFEST}", manifest)
        return str(manifest["digest"])

    def verify_tree(self, prefix: str) -> dict[str, Any] | None:
        """The manifest if it is sound and every file that it names is there with its size; None otherwise."""
        try:
            manifest = self.manifest(prefix)
        except RunFailure as failure:
            log.warning("storage: %s", failure.message)
            return None
        if manifest is None:
            return None
        sizes = {entry.key: entry.size for entry in self.list(prefix)}
        complete = all(sizes.get(f"{prefix}/{file.path}") == file.size for file in digests.files_of(manifest))
        return manifest if complete else None

    def download_tree(
        self,
        prefix: str,
        directory: Path,
        digest: str | None = None,
        manifest: dict[str, Any] | None = None,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Any]:
        """Download what a manifest lists and check every file's sha256; returns the manifest.

        `digest`: refuse any other. `manifest`: use this one (for folders of users, which have none). Files already
        there and right are kept. Small files come whole, large ones in ranges over several connections.
        """
        manifest = manifest or self.manifest(prefix)
        if manifest is None:
            raise RunFailure(
                failures.DOWNLOAD_FAILED, f"{self.uri(prefix)} has no {digests.MANIFEST}: it was never completed"
            )
        if digest and manifest["digest"] != digest:
            raise RunFailure(
                failures.DIGEST_MISMATCH, f"{self.uri(prefix)} has digest {manifest['digest']}, {digest} was asked for"
            )
        wanted = [file for file in digests.files_of(manifest) if not _holds(directory, file)]
        for file in wanted:
            path = directory / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with full_disk(path), open(path, "wb") as target:
                target.truncate(file.size)
        ranges = [(file, offset) for file in wanted for offset in range(0, file.size, _RANGE)]

        def fetch(part: tuple[digests.File, int]) -> None:
            file, offset = part
            length = min(_RANGE, file.size - offset)
            self._fetch_range(f"{prefix}/{file.path}".lstrip("/"), directory / file.path, offset, length)
            on_bytes(length)

        with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
            list(pool.map(fetch, ranges))
            wrong = [
                file.path
                for file, right in zip(wanted, pool.map(lambda f: _holds(directory, f), wanted), strict=True)
                if not right
            ]
        if wrong:
            raise RunFailure(
                failures.DIGEST_MISMATCH,
                f"{self.uri(prefix)}/{wrong[0]} is not the file that its manifest lists ({len(wrong)} such): "
                "it was changed after it was recorded; start a new run",
            )
        return manifest

    def _fetch_range(self, key: str, path: Path, offset: int, length: int) -> None:
        def fetch() -> None:
            with full_disk(path), open(path, "r+b") as target, self.open(key, offset, length) as response:
                target.seek(offset)
                target.writelines(response.stream(_CHUNK))

        try:
            self._patiently(f"downloading {self.uri(key)}", fetch)
        except ObjectNotFound as error:
            raise RunFailure(failures.DOWNLOAD_FAILED, f"{self.uri(key)} is gone; its manifest lists it") from error

    def _read_back(self, key: str, path: Path) -> None:
        stored, size = self.stat(key), path.stat().st_size
        if stored is None or stored.size != size:
            held = "nothing" if stored is None else f"{stored.size} bytes"
            raise RunFailure(failures.UPLOAD_FAILED, f"{self.uri(key)} holds {held} after an upload of {size} bytes")
        if stored.etag != _etag(path):  # an ETag is no checksum under SSE-KMS: then the content itself decides
            remote, local = self.hash_object(key, path.name), digests.hash_file(path)
            if (remote.sha256, remote.size) != local:
                raise RunFailure(
                    failures.UPLOAD_FAILED, f"{self.uri(key)} reads back with other content than was uploaded"
                )

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key.strip("/")) if part)

    def _patiently(self, what: str, operation: Callable[[], Answer]) -> Answer:
        return self._patience.run(what, self.bucket, operation)


def _etag(path: Path) -> str:
    """The ETag that an unencrypted upload of this file with our part size has."""
    parts: list[bytes] = []
    with open(path, "rb") as source:
        while True:
            md5, left = hashlib.md5(usedforsecurity=False), _PART
            while left and (chunk := source.read(min(left, _CHUNK))):
                md5.update(chunk)
                left -= len(chunk)
            if left == _PART and parts:
                break
            parts.append(md5.digest())
            if left:
                break
    if len(parts) == 1:
        return parts[0].hex()
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


def _holds(directory: Path, file: digests.File) -> bool:
    path = directory / file.path
    return path.is_file() and path.stat().st_size == file.size and digests.hash_file(path)[0] == file.sha256
