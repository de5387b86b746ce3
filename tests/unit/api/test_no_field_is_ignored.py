"""A field of a spec is read by the product, or refused as not supported yet: never silently ignored."""

import ast
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.pod import PodTemplate
from finetune_operator.api.unsupported import NOT_SUPPORTED_YET

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("operator", "trainer_image", "serving_image")
# Fields that a CEL rule allows only together with a field that is refused.
REFUSED_WITH: dict[str, str] = {}


@cache
def names_in_the_product() -> frozenset[str]:
    """Every attribute and text constant in the code outside the types: where fields are read by their names."""
    names: set[str] = set()
    for root in SOURCES:
        for path in (ROOT / root).rglob("*.py"):
            if path.parent.name == "api" or path.name == "crdgen.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    names.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    names.add(node.value)
    return frozenset(names)


def parts(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from parts(inner)


def fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """(path, attribute) of every field. A pod template's own parts are Kubernetes', and copied as they are."""
    for attribute, field in model.model_fields.items():
        here = f"{path}{field.alias or attribute}"
        yield here, attribute
        if model is not PodTemplate:
            for part in parts(field.annotation):
                yield from fields(part, f"{here}.")


@pytest.mark.parametrize("kind, spec", [("FineTune", FineTuneSpec), ("AdapterDeployment", AdapterDeploymentSpec)])
def test_every_field_is_read_somewhere_or_refused(kind: str, spec: type[BaseModel]) -> None:
    known = names_in_the_product()
    ignored = [
        path
        for path, attribute in fields(spec)
        if attribute not in known
        and path.rpartition(".")[2] not in known
        and not any(f"{REFUSED_WITH.get(path, path)}.".startswith(f"{refused}.") for refused in NOT_SUPPORTED_YET[kind])
    ]
    assert ignored == []
