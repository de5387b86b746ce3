"""FineTune files on this machine: YAML as people apply it, read with the API's own types."""

from __future__ import annotations

import difflib
import json
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune_operator.api.dataset import ConfigMapSource
from finetune_operator.api.finetune import FineTune
from finetune_trainer.command import apirules
from finetune_trainer.data.rows import DataFile


class BadFile(Exception):
    """A file that holds no usable FineTune; the message names the field and what is wrong with it."""


def read_finetune(path: Path) -> FineTune:
    """The FineTune in a YAML file, which may hold other objects too."""
    objects = _documents(path)
    found = [document for document in objects if document.get("kind") == "FineTune"]
    if len(found) != 1:
        kinds = [str(document["kind"]) for document in objects if document.get("kind")]
        instead = f"; it holds {', '.join(kinds[:8])}" if kinds and not found else ""
        raise BadFile(
            f"{path} holds {len(found)} FineTunes: one is needed (apiVersion: finetune.dev/v1alpha1, kind: FineTune){instead}"
        )
    return checked(found[0], str(path))


def checked(document: dict[str, Any], what: str) -> FineTune:
    """The FineTune of a document, held to the schema and the rules that the API server holds it to."""
    try:
        tune = FineTune.model_validate(document)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc']))}: {_told(one)}" for one in error.errors()]
        raise BadFile("\n  ".join([f"{what} is not a valid FineTune:", *wrong])) from error
    broken = apirules.broken(tune)
    if broken is None:
        print(apirules.MISSING, file=sys.stderr)
    elif broken:
        raise BadFile("\n  ".join([f"{what} is not a valid FineTune:", *broken]))
    return tune


def _told(error: ErrorDetails) -> str:
    """What is wrong with a field, in words that help who has misspelt it."""
    if error["type"] != "extra_forbidden":
        return error["msg"]
    parts = [FineTune.model_json_schema(), *FineTune.model_json_schema()["$defs"].values()]
    names = {name for part in parts for name in part.get("properties", {})}
    close = difflib.get_close_matches(str(error["loc"][-1]), names, n=1)
    return "there is no such field" + (f"; did you mean {close[0]}?" if close else "")


def config_map_file(path: Path, source: ConfigMapSource, directory: Path) -> DataFile | None:
    """The file of a ConfigMap that stands beside the FineTune in its YAML file, written to `directory`."""
    for document in _documents(path):
        named = (document.get("metadata") or {}).get("name")
        if document.get("kind") == "ConfigMap" and named == source.name and source.key in (document.get("data") or {}):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / source.key).write_text(document["data"][source.key], encoding="utf-8")
            return DataFile(directory / source.key, source.key)
    return None


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it: a field that is there twice is an error, not the second one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"  # `<<`, which may stand there for several anchors


@cache
def _stdin() -> str:
    return sys.stdin.read()


def documents(path: Path) -> list[Any]:
    """What is in a YAML or JSON file, or in standard input (`-`). Raises: BadFile, with the line."""
    try:
        text = _stdin() if str(path) == "-" else path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):  # JSON may be indented with tabs, YAML may not
            with suppress(ValueError):
                return [json.loads(text)]
        return list(yaml.load_all(text, Loader=_Loader))  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        wrong = ", ".join(part for part in (error.problem, error.context) if part)
        raise BadFile(f"{path}{at}: no YAML: {wrong}") from error
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadFile(f"{path} cannot be read: {error}") from error


def _documents(path: Path) -> list[dict[str, Any]]:
    found = [one for one in documents(path) if isinstance(one, dict)]
    listed = [
        one["items"] if one.get("kind") == "List" and isinstance(one.get("items"), list) else [one] for one in found
    ]
    return [one for items in listed for one in items if isinstance(one, dict)]
