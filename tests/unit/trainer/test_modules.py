"""The package's map names every package and every module beside them, so that whoever looks for a behaviour finds it."""

from __future__ import annotations

from pathlib import Path

import finetune_trainer

PACKAGE = Path(finetune_trainer.__file__).parent


def test_every_package_and_module_has_its_place_on_the_map() -> None:
    rows = [line.split("  ", 1) for line in (finetune_trainer.__doc__ or "").splitlines() if "  " in line]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    mapped = [name.strip() for title, what in rows if title not in folders for name in what.split(",")]
    assert folders <= {title for title, _ in rows}
    assert sorted(mapped) == sorted(files)
