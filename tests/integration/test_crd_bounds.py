"""Every bound in the schemas, one by one, against the real API server: just inside is accepted, just outside is not."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from finetune_operator.api import AdapterDeployment, FineTune

from .apiserver import Client, Object
from .crd_cases import EVERYTHING_GROUP, causes, crds_with_everything, rule_messages
from .test_crd_adapterdeployment import MINIMAL as MINIMAL_ADAPTER_DEPLOYMENT
from .test_crd_finetune import MINIMAL as MINIMAL_FINE_TUNE

Schema = dict[str, Any]
Path = tuple[str | int, ...]

# A value for each pattern in the schemas.
SAMPLES = [
    "x",
    "a1",
    "10m",
    "1Gi",
    "auto",
    "loss",
    "s3://models/tiny",
    "https://example.com/x",
    "0" * 64,
    "sha256:" + "0" * 64,
    "nvidia.com/gpu",
]
# Matches no pattern and is no member of any enumeration.
NONSENSE = "/../\u00a7 nonsense"


@dataclass(frozen=True)
class Leaf:
    """One field of a kind's spec."""

    kind: str
    path: Path
    schema: Schema

    def __str__(self) -> str:
        return f"{self.kind}.{shown(self.path)}"


def shown(path: Path) -> str:
    """As in the API server's errors: spec.adapters[0].name."""
    text = "spec"
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}"
    return text


def leaves(kind: str, schema: Schema, path: Path = ()) -> Iterator[Leaf]:
    yield Leaf(kind, path, schema)
    for name, field in schema.get("properties", {}).items():
        yield from leaves(kind, field, (*path, name))
    if "items" in schema:
        yield from leaves(kind, schema["items"], (*path, 0))
    if "additionalProperties" in schema:
        yield from leaves(kind, schema["additionalProperties"], (*path, "key"))


def sample(schema: Schema, number: int = 0) -> Any:
    """A smallest value that the schema allows; different numbers give different values where a list needs that."""
    if "enum" in schema:
        return schema["enum"][number % len(schema["enum"])]
    if schema.get("type") == "object":
        return {name: sample(schema["properties"][name], number) for name in schema.get("required", [])}
    if schema.get("type") == "array":
        return [sample(schema["items"], n) for n in range(schema.get("minItems", 0))]
    if schema.get("type") in ("integer", "number"):
        return schema.get("maximum", 1)
    if schema.get("type") == "boolean":
        return True
    return next(text for text in texts(number) if matches(schema, text))


def texts(number: int) -> Iterator[str]:
    yield from (f"x{number}" for _ in range(number and 1))
    yield from SAMPLES


def matches(schema: Schema, text: str) -> bool:
    return re.search(schema.get("pattern", ""), text) is not None and len(text) >= schema.get("minLength", 0)


def outside(schema: Schema) -> Iterator[Any]:
    """Values just outside the schema's bounds."""
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        yield NONSENSE
        yield from (schema["minimum"] - 1, schema["maximum"] + 1) if "minimum" in schema else ()
    elif kind == "string":
        yield 7
        yield from [NONSENSE] if "enum" in schema or "pattern" in schema else []
        yield from ["x" * (schema["maxLength"] + 1)] if "maxLength" in schema else []
        yield from [""] if schema.get("minLength") else []
    elif kind in ("integer", "number"):
        step = 0 if schema.get("exclusiveMinimum") else 1
        yield "text"
        yield from [schema["minimum"] - step] if "minimum" in schema else []
        yield from [schema["maximum"] + 1] if "maximum" in schema else []
    elif kind == "boolean":
        yield "maybe"
    elif kind == "array":
        yield {}
        yield [sample(schema["items"], n) for n in range(schema["maxItems"] + 1)]
        yield from [[]] if schema.get("minItems") else []
    elif "maxProperties" in schema:
        value = sample(schema["additionalProperties"])
        yield {f"key{n}": value for n in range(schema["maxProperties"] + 1)}
    else:
        yield []
        for name in schema.get("required", []):
            yield {other: value for other, value in sample(schema).items() if other != name}


def inside(schema: Schema) -> Iterator[Any]:
    """Values just inside the schema's bounds."""
    kind = schema.get("type")
    if "enum" in schema:
        yield from schema["enum"]
    elif schema.get("x-kubernetes-int-or-string"):
        yield sample(schema)
        yield from (schema["minimum"], schema["maximum"]) if "minimum" in schema else (1,)
    elif kind == "string":
        yield sample(schema)
        yield from ["x" * schema["maxLength"]] if "pattern" not in schema else []
    elif kind in ("integer", "number"):
        yield from [schema["minimum"]] if "minimum" in schema and not schema.get("exclusiveMinimum") else []
        yield from [schema["maximum"]] if "maximum" in schema else []
    elif kind == "boolean":
        yield from (True, False)
    elif kind == "array":
        most = len(schema["items"]["enum"]) if "enum" in schema["items"] else schema["maxItems"]
        yield [sample(schema["items"], n + 1) for n in range(min(most, schema["maxItems"]))]
    elif "maxProperties" in schema:
        value = sample(schema["additionalProperties"])
        yield {f"key{n}": value for n in range(schema["maxProperties"])}
    else:
        yield sample(schema)


def with_value(minimal: Object, spec_schema: Schema, path: Path, value: Any) -> Object:
    """The minimal object with `value` at `path`; whatever is required beside the path is filled in."""

    def put(schema: Schema, old: Any, rest: Path) -> Any:
        if not rest:
            return value
        key = rest[0]
        if isinstance(key, int):
            return [put(schema["items"], old[0] if old else sample(schema["items"]), rest[1:])]
        old = sample(schema) if old is None else old
        field = schema["properties"][key] if "properties" in schema else schema["additionalProperties"]
        return {**old, key: put(field, old.get(key), rest[1:])}

    obj: Object = json.loads(json.dumps(minimal)) | {"apiVersion": f"{EVERYTHING_GROUP}/v1alpha1"}
    obj["spec"] = put(spec_schema, obj["spec"], path)
    return obj


TYPES: dict[str, type[BaseModel]] = {"FineTune": FineTune, "AdapterDeployment": AdapterDeployment}
MINIMAL = {"FineTune": MINIMAL_FINE_TUNE, "AdapterDeployment": MINIMAL_ADAPTER_DEPLOYMENT}
SPECS: dict[str, Schema] = {
    crd["spec"]["names"]["kind"]: crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for crd in crds_with_everything()
}
LEAVES = [leaf for kind, spec in SPECS.items() for leaf in leaves(kind, spec) if leaf.path]


def schema_errors(kube: Client, leaf: Leaf, value: Any) -> set[tuple[str, str]]:
    """What the schema, rather than a CEL rule, has against an object with `value` at the leaf's path."""
    found = causes(kube, with_value(MINIMAL[leaf.kind], SPECS[leaf.kind], leaf.path, value))
    rules = tuple(rule_messages(leaf.kind))
    return {(field, message) for field, message in found if not message.endswith(rules)}


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_a_value_just_outside_a_bound_is_refused_at_its_field(kube: Client, leaf: Leaf) -> None:
    for value in outside(leaf.schema):
        refused = schema_errors(kube, leaf, value)
        assert any(field.startswith(shown(leaf.path).removesuffix(".key")) for field, _ in refused), (value, refused)


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_the_types_refuse_what_the_schema_refuses(leaf: Leaf) -> None:
    for value in outside(leaf.schema):
        obj = with_value(MINIMAL[leaf.kind], SPECS[leaf.kind], leaf.path, value)
        with pytest.raises(ValidationError):
            TYPES[leaf.kind].model_validate(obj | {"apiVersion": MINIMAL[leaf.kind]["apiVersion"]})


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_a_value_just_inside_a_bound_is_accepted(kube: Client, leaf: Leaf) -> None:
    for value in inside(leaf.schema):
        assert schema_errors(kube, leaf, value) == set(), value
