"""Which files of a folder hold rows."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from finetune_trainer.data.rows import DataFile
from finetune_trainer.digest import MANIFEST

_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"}
# What lies beside rows and holds none: of our own trees, and of the datasets library.
_ABOUT = {MANIFEST, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def data_files(names: list[str]) -> list[str]:
    """The files of a folder that hold rows: those with a known ending, or all when none has one."""
    seen = [
        name
        for name in names
        if not any(part.startswith((".", "_")) for part in name.split("/")) and PurePosixPath(name).name not in _ABOUT
    ]
    known = [name for name in seen if _SUFFIXES & {suffix.lower() for suffix in PurePosixPath(name).suffixes}]
    return sorted(known or seen)


def files_at(path: Path) -> list[DataFile]:
    """A file, or those of a folder that hold rows; none when there is nothing there."""
    if path.is_file():
        return [DataFile(path, path.name)]
    found = [file for file in path.rglob("*") if file.is_file() and file.stat().st_size] if path.is_dir() else []
    names = [file.relative_to(path).as_posix() for file in found]
    return [DataFile(path / name, name) for name in data_files(names)]
