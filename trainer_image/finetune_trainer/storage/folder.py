"""A local folder in place of a bucket: the five calls that Store makes of an S3 client, on files.

An object is written under another name and renamed when it is whole, so what has its name is never half of it. There is
no server that could have damaged it on the way; Store reads it back all the same, as it does with a bucket.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from finetune_trainer.storage.connection import ObjectNotFound, full_disk

_PARTIAL = ".partial"
_CHUNK = 1 << 20


class Entry(NamedTuple):
    """What is known of a file without reading it. Its ETag changes with it, and is no checksum."""

    object_name: str
    size: int
    etag: str
    is_dir: bool = False


class Content:
    """A file, or a range of it, as a response that streams."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  # closed by close(), as responses are
        self._file.seek(offset)
        self._left = length or path.stat().st_size - offset

    def stream(self, chunk: int = _CHUNK) -> Iterator[bytes]:
        while self._left and (data := self._file.read(min(chunk, self._left))):
            self._left -= len(data)
            yield data

    def read(self) -> bytes:
        return b"".join(self.stream())

    def close(self) -> None:
        self._file.close()

    def release_conn(self) -> None:
        """There is no connection to give back."""


class FolderClient:
    """Objects are files; the bucket's name is empty and keys are absolute paths without their first slash."""

    def put_object(
        self, bucket: str, key: str, data: BinaryIO, length: int, content_type: str = "", part_size: int = 0
    ) -> None:
        path = _path(bucket, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}{_PARTIAL}")
        try:
            with full_disk(path), open(partial, "wb") as target:
                shutil.copyfileobj(data, target, _CHUNK)
                target.flush()
                os.fsync(target.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def get_object(self, bucket: str, key: str, offset: int = 0, length: int = 0) -> Content:
        return Content(_existing(bucket, key), offset, length)

    def stat_object(self, bucket: str, key: str) -> Entry:
        return _entry(_existing(bucket, key))

    def list_objects(self, bucket: str, prefix: str, recursive: bool = True) -> Iterator[Entry]:
        for path in _path(bucket, prefix).rglob("*") if recursive else _path(bucket, prefix).iterdir():
            if path.is_file() and not path.name.endswith(_PARTIAL):
                yield _entry(path)

    def remove_object(self, bucket: str, key: str) -> None:
        path = _path(bucket, key)
        if path.is_file():
            path.unlink()
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()  # a bucket has no empty folders


def _path(bucket: str, key: str) -> Path:
    return Path("/", bucket, key)


def _existing(bucket: str, key: str) -> Path:
    path = _path(bucket, key)
    if not path.is_file():
        raise ObjectNotFound(f"{path} does not exist")
    return path


def _entry(path: Path) -> Entry:
    found = path.stat()
    return Entry(path.as_posix().lstrip("/"), found.st_size, f"{found.st_mtime_ns}-{found.st_size}")
