"""The identity of a set of files: sha256 of the canonical JSON of [{path, sha256, size}, ...] sorted by path.

Standard library only, because serving verifies adapters with the same code. Anyone can recompute a digest from a
manifest:

    sha256(json.dumps(sorted(files, key=path), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
_CHUNK = 4 << 20


class File(NamedTuple):
    """One file of a tree: path relative to its root with `/`, sha256 in hex, size in bytes."""

    path: str
    sha256: str
    size: int


def canonical_json(value: Any) -> bytes:
    """UTF-8, sorted keys, no spaces: the one spelling of a JSON value that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def without_nan(value: Any) -> Any:
    """A value without NaN and infinities, which JSON does not know: a metric that is none is left out."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items() if not _is_nan(item)}
    return [without_nan(item) for item in value] if isinstance(value, list) else value


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> tuple[str, int]:
    """(sha256 in hex, size in bytes) of a file, read in chunks."""
    sha, size = hashlib.sha256(), 0
    with open(path, "rb") as source:
        while chunk := source.read(_CHUNK):
            sha.update(chunk)
            size += len(chunk)
    return sha.hexdigest(), size


def hash_tree(directory: Path) -> list[File]:
    """Every file under `directory` but the manifest, sorted by path."""
    paths = sorted(
        (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()),
    )
    paths = [path for path in paths if path != MANIFEST]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the GIL
        return [
            File(path, *hashed)
            for path, hashed in zip(paths, pool.map(lambda p: hash_file(directory / p), paths), strict=True)
        ]


def tree_digest(files: Iterable[File]) -> str:
    """`sha256:<hex>` over the canonical JSON of the files, sorted by path, the manifest left out."""
    listed = sorted((file for file in files if file.path != MANIFEST), key=lambda file: file.path)
    return "sha256:" + sha256_hex(canonical_json([file._asdict() for file in listed]))


def hex_of(digest: str) -> str:
    """The hex part of `sha256:<hex>`; object keys use it, since a colon in a key breaks some tools."""
    return digest.removeprefix("sha256:")


def short(digest: str) -> str:
    """The first 12 hex digits: what people see and what served model names carry."""
    return hex_of(digest)[:12]


def manifest_of(files: Iterable[File], **extra: Any) -> dict[str, Any]:
    """The content of manifest.json: digest, files, and what the writer wants to record beside them."""
    listed = sorted((file for file in files if file.path != MANIFEST), key=lambda file: file.path)
    return {"digest": tree_digest(listed), "files": [file._asdict() for file in listed], **extra}


def files_of(manifest: dict[str, Any]) -> list[File]:
    """The files that a manifest lists; ValueError when they do not hash to the digest that it states."""
    files = [File(str(entry["path"]), str(entry["sha256"]), int(entry["size"])) for entry in manifest["files"]]
    for file in files:
        if file.path.startswith("/") or ".." in file.path.split("/"):
            raise ValueError(f"the manifest lists {file.path!r}, which is outside its folder")
    if tree_digest(files) != manifest["digest"]:
        raise ValueError(f"the manifest states {manifest['digest']}, its files hash to {tree_digest(files)}")
    return files
