"""Which files of a folder hold rows."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from finetune_trainer.data.rows import DataFile
from finetune_trainer.digest import MANIFEST

_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}


def data_files(names: list[str]) -> list[str]:
    """The files of a folder that hold rows: those with a known ending, or all when none has one."""
    seen = [
        name for name in names if not any(part.startswith((".", "_")) for part in name.split("/")) and name != MANIFEST
    ]
    known = [name for name in seen if _SUFFIXES & {suffix.lower() for suffix in PurePosixPath(name).suffixes}]
    return sorted(known or seen)


def files_at(path: Path) -> list[DataFile]:
    """A file, or those of a folder that hold rows; none when there is nothing there."""
    if path.is_file():
        return [DataFile(path, path.name)]
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return [DataFile(path / name, name) for name in data_files(names)]
