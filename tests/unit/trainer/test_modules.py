"""The package's map names every module once, so that whoever looks for a behaviour finds it."""

from __future__ import annotations

from pathlib import Path

import finetune_trainer

PACKAGE = Path(finetune_trainer.__file__).parent


def test_every_module_has_its_place_on_the_map() -> None:
    rows = [line for line in (finetune_trainer.__doc__ or "").splitlines() if "  " in line]
    mapped = [name for line in rows for name in line.split("  ", 1)[1].replace(",", " ").split()]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    assert sorted(mapped) == sorted(files | folders)
