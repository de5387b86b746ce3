"""Writes the parts of the documentation that come from code: run it after a change, `--check` fails on a stale file.

    python docs/generate.py [--check]

docs/api.md                                    from crds/*.yaml
docs/operations.md (reasons)                   from finetune_operator.reasons
docs/finetune.md, docs/serving.md (refused)    from finetune_operator.api.unsupported
docs/methods.md (layers)                       from finetune_trainer.memory.architecture, by docs/targets.py
docs/memory.md (tables)                        from finetune_trainer.memory.estimate and .verdict, by docs/memory.py
docs/cli.md (help)                             from finetune_trainer.command.cli
charts/finetune-operator/README.md (values)    from the `# --` comments of values.yaml
charts/finetune-operator/values.schema.json    its descriptions, from the same comments
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "finetune-operator"


# The chart's values


@dataclass(frozen=True)
class Value:
    path: str  # images.engine.tag
    default: Any
    description: str


def values(text: str) -> list[Value]:
    """The described values of a values.yaml: a `# --` comment (and the `#` lines after it) describes the key below."""
    defaults = yaml.safe_load(text)
    described: list[Value] = []
    parents: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            comment = [stripped.removeprefix("# -- ")]
        elif stripped.startswith("#") and comment:
            comment.append(stripped.lstrip("# "))
        elif match := re.match(r"( *)([A-Za-z][A-Za-z0-9]*):", line):
            indent = len(match[1])
            parents = [parent for parent in parents if parent[0] < indent] + [(indent, match[2])]
            if comment:
                keys = [key for _, key in parents]
                described.append(Value(".".join(keys), _at(defaults, keys), " ".join(comment)))
            comment = []
        else:
            comment = []
    return described


def _at(tree: Any, keys: list[str]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def values_table(described: list[Value]) -> str:
    rows = [f"| `{value.path}` | `{json.dumps(value.default)}` | {_cell(value.description)} |" for value in described]
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *rows])


def schema_with_descriptions(schema: dict[str, Any], described: list[Value]) -> dict[str, Any]:
    for value in described:
        node = schema
        for key in value.path.split("."):
            node = _properties(schema, node)[key]
        node["description"] = value.description
    return schema


def _properties(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["definitions"][node["$ref"].removeprefix("#/definitions/")]
    return dict(node["properties"])


# The API


def api_page(crds: list[dict[str, Any]]) -> str:
    parts = [
        "# API reference",
        "",
        "Generated from `crds/` by `make generate`; `kubectl explain finetune.spec --recursive` shows the same in a terminal.",
        "A field marked *required* has no default. What must hold between fields is in the rules below each kind: the API",
        "server refuses an object that breaks one, with the message shown.",
    ]
    seen: dict[str, str] = {}
    for crd in crds:
        parts += ["", *_kind(crd, seen)]
    return "\n".join(parts) + "\n"


HEADER = ("| field | type | default | meaning |", "|---|---|---|---|")


def _kind(crd: dict[str, Any], seen: dict[str, str]) -> Iterator[str]:
    """`seen` holds the heading under which a part was shown, by its schema."""
    names, version = crd["spec"]["names"], crd["spec"]["versions"][0]
    schema = version["schema"]["openAPIV3Schema"]
    yield f"## {names['kind']}"
    yield ""
    short = ", ".join(names["shortNames"])
    yield f"`apiVersion: {crd['spec']['group']}/{version['name']}`, `kubectl get {names['plural']}` (short: {short})."
    for part in ("spec", "status"):
        fields, required = schema["properties"][part]["properties"], schema["properties"][part].get("required", [])
        plain = {name: field for name, field in fields.items() if not _has_parts(field)}
        yield from ("", f"### {names['kind']} {part}", "", *HEADER)
        for name, field in fields.items():
            yield _row(name, field, name in required, link=None if name in plain else f"{names['kind']} {part}.{name}")
        for name in (name for name in fields if name not in plain):
            heading = f"{names['kind']} {part}.{name}"
            yield from ("", f"### {heading}", "")
            before = seen.setdefault(json.dumps(fields[name], sort_keys=True), heading)
            if before != heading:
                yield f"As [{before}](#{_anchor(before)})."
                continue
            yield from HEADER
            yield from _rows("", fields[name])
    rules = list(_rules("", schema))
    if rules:
        yield from ("", f"### {names['kind']} rules", "", "| where | message when it is broken |", "|---|---|")
        for path, message in rules:
            yield f"| `{path or 'the object'}` | {_cell(message)} |"


def _has_parts(schema: dict[str, Any]) -> bool:
    return "properties" in schema or (schema.get("type") == "array" and _has_parts(schema["items"]))


def _rows(path: str, schema: dict[str, Any]) -> Iterator[str]:
    while schema.get("type") == "array":
        schema, path = schema["items"], path + "[]" if path else ""
    for name, field in schema.get("properties", {}).items():
        below = f"{path}.{name}".lstrip(".")
        yield _row(below, field, name in schema.get("required", []))
        if _has_parts(field):
            yield from _rows(below, field)


def _row(path: str, schema: dict[str, Any], required: bool, link: str | None = None) -> str:
    shown = f"[`{path}`](#{_anchor(link)})" if link else f"`{path}`"
    default = f"`{json.dumps(schema['default'])}`" if schema.get("default") not in (None, {}, []) else ""
    return f"| {shown} | {_type(schema)} | {'*required*' if required else default} | {_cell(schema.get('description', ''))} |"


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "integer or string" + _bounds(schema)
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map of {_type(schema['additionalProperties'])}"
    kind = schema.get("type", "any")
    return f"{'date-time' if schema.get('format') == 'date-time' else kind}{_bounds(schema)}"


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None and high is None:
        return ""
    return (
        f", {low:,} to {high:,}"
        if high is not None and low is not None
        else f", from {low:,}"
        if high is None
        else f", up to {high:,}"
    )


def _anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _rules(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for rule in schema.get("x-kubernetes-validations", []):
        yield path, rule.get("message", rule["rule"])
    for name, field in schema.get("properties", {}).items():
        yield from _rules(f"{path}.{name}".lstrip("."), field)
    if "items" in schema:
        yield from _rules(path + "[]", schema["items"])


# The reasons, and what is refused for now

RETRIES = {
    "never": "not tried again",
    "infrastructure": "tried again, out of `retry.infrastructure`",
    "unforeseen": "tried again, out of `retry.infrastructure`; before the first step only once",
    "outOfMemory": "tried again with half the micro batch, out of `retry.outOfMemory`",
    "free": "tried again at no cost",
}


def failures_table() -> str:
    from finetune_operator.reasons import FAILURES

    rows = [f"| `{name}` | {RETRIES[failure.retry]} | {_cell(failure.hint)} |" for name, failure in FAILURES.items()]
    return "\n".join(["| reason | what the operator does | what you can do |", "|---|---|---|", *rows])


def waiting_table() -> str:
    from finetune_operator.reasons import WAITING

    rows = [f"| `{name}` | {_cell(hint)} |" for name, hint in WAITING.items()]
    return "\n".join(["| reason | meaning |", "|---|---|", *rows])


def command_help() -> str:
    """What `finetune` and each command that people run by hand say to --help."""
    from finetune_trainer.command.cli import parser, subparsers

    root = parser()
    shown = {"finetune": root} | {f"finetune {name}": one for name, one in subparsers(root).items()}
    parts = [f"### {name}\n\n```text\n{_help(one)}\n```" for name, one in shown.items()]
    return "\n\n".join(parts)


def _help(command: argparse.ArgumentParser) -> str:
    """The help at 100 columns, whatever the terminal has."""
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100"
    try:
        return command.format_help().strip()
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)


def methods_page(text: str) -> str:
    from targets import targets_table

    return with_section(text, "targets", targets_table())


def memory_page(text: str) -> str:
    import memory

    for name, write in memory.SECTIONS.items():
        text = with_section(text, name, write())
    return text


def unsupported_list(kind: str) -> str:
    from finetune_operator.api.unsupported import NOT_SUPPORTED_YET

    fields = NOT_SUPPORTED_YET.get(kind, {})
    if not fields:
        return "Every field works."
    rows = [f"| `{path}` | `{_cell(used)}` |" for path, used in fields.items()]
    return "\n".join(["| field | refused when |", "|---|---|", *rows])


# Files


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def with_section(text: str, name: str, content: str) -> str:
    """`text` with what is between its two `generated: name` markers replaced."""
    begin, end = f"<!-- generated: {name} -->", f"<!-- end generated: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected {begin} and {end} exactly once")
    return text[: text.index(begin) + len(begin)] + f"\n{content}\n" + text[text.index(end) :]


def generated() -> dict[Path, str]:
    described = values((CHART / "values.yaml").read_text())
    schema, readme, docs = CHART / "values.schema.json", CHART / "README.md", ROOT / "docs"
    operations = with_section((docs / "operations.md").read_text(), "failures", failures_table())
    crds = [
        yaml.load(path.read_text(), yaml.CSafeLoader) for path in sorted((ROOT / "crds").glob("*.yaml"), reverse=True)
    ]
    return {
        schema: json.dumps(schema_with_descriptions(json.loads(schema.read_text()), described), indent=2) + "\n",
        readme: with_section(readme.read_text(), "values", values_table(described)),
        docs / "operations.md": with_section(operations, "waiting", waiting_table()),
        docs / "finetune.md": with_section(
            (docs / "finetune.md").read_text(), "unsupported", unsupported_list("FineTune")
        ),
        docs / "serving.md": with_section(
            (docs / "serving.md").read_text(), "unsupported", unsupported_list("AdapterDeployment")
        ),
        docs / "api.md": api_page(crds),
        docs / "methods.md": methods_page((docs / "methods.md").read_text()),
        docs / "memory.md": memory_page((docs / "memory.md").read_text()),
        docs / "cli.md": with_section((docs / "cli.md").read_text(), "help", command_help()),
    }


def main() -> int:
    files = generated()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `make generate` and commit it", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
