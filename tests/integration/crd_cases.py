"""What the tests of the CRDs' rules share: a case per rule, and objects built by changing a minimal one."""

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.api.unsupported import NOT_SUPPORTED_YET

from .apiserver import ApiError, Client, Object

Changes = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
GROUP = "finetune.dev"
# The same CRDs without the rules that refuse what is not supported yet, so that every other rule can be kept as well as
# broken. Installed beside the real ones by the fixture `kube`.
EVERYTHING_GROUP = "everything.finetune.dev"


@dataclass(frozen=True)
class Case:
    """One rule: an object that breaks it, the field that the error points to, and an object that keeps it.

    `bad` and `good` change the minimal object: path below spec (or metadata.name) -> value.
    """

    message: str
    at: str
    bad: Changes
    good: Changes

    def __str__(self) -> str:
        return f"{self.at}: {self.message}"


@cache
def crds() -> list[Object]:
    return [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("*.yaml"))]


@cache
def crds_with_everything() -> list[Object]:
    """The CRDs in a group of their own, as they will be once NOT_SUPPORTED_YET is empty."""
    changed = copy.deepcopy(crds())
    for crd in changed:
        names = crd["spec"]["names"]
        crd["metadata"]["name"] = f"{names['plural']}.{EVERYTHING_GROUP}"
        crd["spec"]["group"] = EVERYTHING_GROUP
        spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        refused = {f"{path}: not supported yet" for path in NOT_SUPPORTED_YET[names["kind"]]}
        rules = [rule for rule in spec["x-kubernetes-validations"] if rule["message"] not in refused]
        spec["x-kubernetes-validations"] = rules
    return changed


@cache
def rule_messages(kind: str) -> frozenset[str]:
    """Every message of a CEL rule in a kind's CRD, but for what is not supported yet."""

    def messages(schema: Any) -> set[str]:
        if isinstance(schema, list):
            return set().union(*map(messages, schema))
        if not isinstance(schema, dict):
            return set()
        own = {rule["message"] for rule in schema.get("x-kubernetes-validations", [])}
        return own.union(*(messages(value) for key, value in schema.items() if key != "x-kubernetes-validations"))

    return frozenset(
        message
        for crd in crds_with_everything()
        if crd["spec"]["names"]["kind"] == kind
        for message in messages(crd["spec"]["versions"][0]["schema"])
    )


def changed(minimal: Object, changes: Changes, group: str = GROUP) -> Object:
    """A copy of a minimal object with these paths set."""
    obj = copy.deepcopy(minimal)
    obj["apiVersion"] = f"{group}/v1alpha1"
    for path, value in changes.items():
        target, keys = (obj, path.split(".")) if path.startswith("metadata.") else (obj["spec"], path.split("."))
        for key in keys[:-1]:
            target = target.setdefault(key, {})
        target[keys[-1]] = value
    return obj


def causes(client: Client, obj: Object) -> set[tuple[str, str]]:
    """(field, message) of everything that the API server has against an object; empty when it takes it."""
    try:
        client.create(obj, dry_run=True)
    except ApiError as error:
        assert error.status == 422, error
        return {(cause["field"], cause["message"]) for cause in error.causes}
    return set()
