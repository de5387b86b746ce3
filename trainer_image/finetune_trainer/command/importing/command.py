"""`finetune import`: another tool's YAML becomes a FineTune, with a line for everything that it cannot say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from finetune_trainer.command.finetunefile import BadFile, checked, documents
from finetune_trainer.command.importing import axolotl, llamafactory
from finetune_trainer.command.importing.common import object_name
from finetune_trainer.command.importing.settings import CannotImport, Settings, without_nothing

TOOLS: dict[str, Any] = {tool.NAME: tool for tool in (axolotl, llamafactory)}


def main(arguments: argparse.Namespace) -> int:
    """Write the FineTune; 1 when it would not train the same."""
    path = Path(arguments.file)
    try:
        text, warnings = imported(path, arguments.tool)
    except BadFile as error:
        print(error, file=sys.stderr)
        return 1
    except CannotImport as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.to == "-":
        sys.stdout.write(text)
    else:
        Path(arguments.to).write_text(text, encoding="utf-8")
        print(f"wrote {arguments.to}", file=sys.stderr)
    return 0


def imported(path: Path, tool: str | None = None) -> tuple[str, list[str]]:
    """(a FineTune in YAML, warnings) of another tool's file. Raises: BadFile, CannotImport."""
    values = _read(path)
    name = tool or detect(values)
    settings = Settings(values)
    spec = axolotl.convert(settings) if name == axolotl.NAME else llamafactory.convert(settings, path.parent)
    settings.warn_of_the_rest()
    document = without_nothing(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTune",
            "metadata": {"name": object_name(path.stem)},
            "spec": spec,
        }
    )
    checked(document, f"what {path} comes to")
    head = f"# Imported from {path.name} ({name}) by finetune import.\n"
    body: str = yaml.safe_dump(document, sort_keys=False, width=120)
    return head + body, settings.warnings


def detect(values: dict[str, Any]) -> str:
    """Whose configuration this is: the tool of which it has more settings."""
    counts = {name: len(tool.MARKS & set(values)) for name, tool in TOOLS.items()}
    best = max(counts, key=lambda name: counts[name])
    if len(set(counts.values())) == 1:
        raise CannotImport(f"neither {' nor '.join(TOOLS)} has settings like these; name the tool with --from")
    return best


def _read(path: Path) -> dict[str, Any]:
    found = documents(path)
    if len(found) != 1 or not isinstance(found[0], dict):
        raise BadFile(f"{path} holds no settings: one YAML document with name: value is expected")
    return {str(name): value for name, value in found[0].items()}
