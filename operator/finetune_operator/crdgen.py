"""Writes crds/*.yaml from the API types.

python -m finetune_operator.crdgen [--check]

--check writes nothing and fails when a file is not what the types say.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from finetune_operator.api import GROUP, VERSION, AdapterDeployment, FineTune, names, unsupported

Schema = dict[str, Any]

CRDS = Path(__file__).resolve().parents[2] / "crds"
HEADER = "# Generated from operator/finetune_operator/api by `make generate`: change the types, not this file.\n"

# Where kubectl apply and Helm store a whole object; beyond it people would need server-side apply.
LARGEST_CRD = 256 * 1024


@dataclass(frozen=True)
class Column:
    """One column of kubectl get; `wide` ones are shown by -o wide only."""

    name: str
    path: str
    wide: bool = False
    type: str = "string"

    def as_printer_column(self) -> Schema:
        return {"name": self.name, "type": self.type, "jsonPath": self.path, **({"priority": 1} if self.wide else {})}


AGE = Column("Age", ".metadata.creationTimestamp", type="date")


@dataclass(frozen=True)
class Kind:
    """What a CRD says beyond the schema of its type."""

    model: type[BaseModel]
    plural: str
    short: str
    columns: tuple[Column, ...]
    scale: Schema | None = None

    @property
    def name(self) -> str:
        return self.model.__name__


KINDS = (
    Kind(
        FineTune,
        plural="finetunes",
        short="ft",
        columns=(
            Column("Phase", ".status.phase"),
            Column("Progress", ".status.summary.progress"),
            Column("Loss", ".status.summary.loss"),
            Column("Eval", ".status.summary.eval"),
            Column("ETA", ".status.summary.eta"),
            Column("Adapter", ".status.summary.adapter"),
            AGE,
            Column("Reason", ".status.reason", wide=True),
            Column("Cost", ".status.summary.cost", wide=True),
            Column("Revision", ".status.baseModel.revision", wide=True),
        ),
    ),
    Kind(
        AdapterDeployment,
        plural="adapterdeployments",
        short="ad",
        columns=(
            Column("Phase", ".status.phase"),
            Column("Mode", ".spec.mode"),
            Column("Adapters", ".status.summary.adapters"),
            Column("Ready", ".status.summary.ready"),
            Column("Adapter", ".status.summary.adapter"),
            AGE,
            Column("Reason", ".status.reason", wide=True),
            Column("Revision", ".status.baseModel.revision", wide=True),
            Column("URL", ".status.url", wide=True),
        ),
        scale={
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    ),
)


class NotStructural(Exception):
    """A type that a CRD cannot express, or that has no bound; names the field."""


def crd(kind: Kind) -> Schema:
    """The whole CustomResourceDefinition of a kind."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.name,
                "listKind": f"{kind.name}List",
                "plural": kind.plural,
                "singular": kind.name.lower(),
                "shortNames": [kind.short],
                "categories": ["ml"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [column.as_printer_column() for column in kind.columns],
                    "subresources": {"status": {}, **({"scale": kind.scale} if kind.scale else {})},
                    "schema": {"openAPIV3Schema": object_schema(kind)},
                }
            ],
        },
    }


def object_schema(kind: Kind) -> Schema:
    """The schema of a kind: its type's spec and status, with the rules on names and on what is not supported yet."""
    source = kind.model.model_json_schema(by_alias=True)
    definitions = source["$defs"]

    def part(name: str) -> Schema:
        field = {key: value for key, value in source["properties"][name].items() if key != "default"}
        return convert(field, definitions, name)

    spec, status = part("spec"), part("status")
    refused = [rule.as_validation() for rule in unsupported.rules(kind.name)]
    spec["x-kubernetes-validations"] = spec.get("x-kubernetes-validations", []) + refused
    return {
        "description": source["description"],
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{kind.name}."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": [rule.as_validation() for rule in names.RULES[kind.name]],
    }


def convert(schema: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    """A JSON schema as pydantic writes it, made structural: no references, unions or titles; everything bounded."""
    schema = _without_reference_and_null(schema, definitions, path)
    schema.pop("title", None)
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    if schema.get("x-kubernetes-int-or-string"):
        return _bounded_text(schema, path)
    convert_type = _CONVERTERS.get(schema.get("type", ""))
    if convert_type is None:
        raise NotStructural(f"{path}: a CRD cannot express {schema}")
    return convert_type(schema, definitions, path)


def _without_reference_and_null(schema: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    """Follows $ref and `X | None`; what stands beside them (description, default) wins over what they point to."""
    schema = dict(schema)
    if "anyOf" in schema:
        options = [option for option in schema.pop("anyOf") if option.get("type") != "null"]
        if len(options) != 1:
            raise NotStructural(f"{path}: a CRD cannot express a choice between {options}")
        schema = _without_reference_and_null(options[0], definitions, path) | schema
    if "$ref" in schema:
        target = definitions[schema.pop("$ref").removeprefix("#/$defs/")]
        schema = _without_reference_and_null(target, definitions, path) | schema
    if schema.get("default", ...) is None:
        del schema["default"]
    return schema


def _object(schema: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    schema.pop("propertyNames", None)  # a CRD has no schema for keys; rules on the types stand in for it
    if "default" in schema:
        schema["default"] = {}  # the API server then fills in the defaults of the fields
    if "properties" in schema:
        schema.pop("additionalProperties", None)  # unknown fields are refused by strict clients, pruned for others
        schema["properties"] = {
            name: convert(field, definitions, f"{path}.{name}") for name, field in schema["properties"].items()
        }
        return schema
    patterns = schema.pop("patternProperties", None)
    values = schema.get("additionalProperties") or next(iter((patterns or {}).values()), None)
    if not isinstance(values, dict) or "maxProperties" not in schema:
        raise NotStructural(f"{path}: a map needs a type of values and max_length")
    schema["additionalProperties"] = convert(values, definitions, f"{path}[*]")
    return schema


def _array(schema: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    if "maxItems" not in schema:
        raise NotStructural(f"{path}: a list needs max_length")
    schema["items"] = convert(schema["items"], definitions, f"{path}[*]")
    schema.setdefault("x-kubernetes-list-type", "atomic")
    return schema


def _bounded_text(schema: Schema, path: str) -> Schema:
    if "maxLength" not in schema and "enum" not in schema:
        raise NotStructural(f"{path}: text needs max_length")
    return schema


def _string(schema: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    return _bounded_text(schema, path)


def _number(schema: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    schema["format"] = "int64" if schema["type"] == "integer" else "double"
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in schema:  # JSON schema: the bound itself; Kubernetes: a flag beside the bound
            schema[bound], schema[exclusive] = schema[exclusive], True
    return schema


def _boolean(schema: Schema, definitions: dict[str, Schema], path: str) -> Schema:
    return schema


_CONVERTERS: dict[str, Callable[[Schema, dict[str, Schema], str], Schema]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": _number,
    "number": _number,
    "boolean": _boolean,
}


class _Dumper(yaml.SafeDumper):
    """Block style, keys in the order of the types, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_yaml(kind: Kind) -> str:
    """The text of a kind's file in crds/."""
    text = HEADER + yaml.dump(crd(kind), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    if len(text.encode()) > LARGEST_CRD:
        raise NotStructural(f"{kind.plural}: {len(text.encode())} bytes are too many for kubectl apply")
    return text


def main(arguments: list[str]) -> int:
    check = arguments == ["--check"]
    if arguments and not check:
        print(__doc__, file=sys.stderr)
        return 2
    stale = False
    for kind in KINDS:
        path, text = CRDS / f"{kind.plural}.yaml", as_yaml(kind)
        if path.exists() and path.read_text() == text:
            continue
        stale = True
        if check:
            print(f"crds/{path.name} is not what the types say: run `make generate`", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(f"wrote crds/{path.name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
