"""FineTune files on this machine: YAML as people apply it, read with the API's own types."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from finetune_operator.api.finetune import FineTune


class BadFile(Exception):
    """A file that holds no usable FineTune; the message names the field and what is wrong with it."""


def read_finetune(path: Path) -> FineTune:
    """The FineTune in a YAML file, which may hold other objects too."""
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadFile(f"{path} cannot be read: {error}") from error
    found = [document for document in documents if isinstance(document, dict) and document.get("kind") == "FineTune"]
    if len(found) != 1:
        raise BadFile(
            f"{path} holds {len(found)} FineTunes: one is needed (apiVersion: finetune.dev/v1alpha1, kind: FineTune)"
        )
    try:
        return FineTune.model_validate(found[0])
    except ValidationError as error:
        wrong = "\n".join(f"  {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise BadFile(f"{path} is not a valid FineTune:\n{wrong}") from error
