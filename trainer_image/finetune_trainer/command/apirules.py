"""The API's CEL rules, checked on this machine: what the API server would refuse, with the same messages.

The rules stand on the types (`Spec.rules`, `api/unsupported.py`); the CEL project's own runtime evaluates them on the
object with the CRD's defaults in it, as the API server does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from finetune_operator.api import names, unsupported
from finetune_operator.api.common import Spec
from finetune_operator.api.finetune import FineTune
from finetune_operator.api.rules import Rule

MISSING = "rules between fields are not checked here: pip install 'finetune-operator[cli]'"


def broken(tune: FineTune, refused: Iterable[Rule] | None = None) -> list[str] | None:
    """`field: message` of every rule that a FineTune breaks; None where there is no CEL runtime.

    `refused`: the rules on what is not supported yet, if they are to be other ones than this version's.
    """
    try:
        from cel_expr_python import cel
    except ImportError:
        return None
    environment = cel.NewEnv(variables={"self": cel.Type.DYN})
    extra = unsupported.rules("FineTune") if refused is None else refused
    meta = {"metadata": {"name": tune.metadata.name}}
    asked = [("", rule, meta) for rule in names.RULES["FineTune"]]
    asked += [("spec", rule, present(tune.spec)) for rule in extra]
    found: list[str] = []
    for path, rule, value in [*asked, *_rules("spec", tune.spec)]:
        if environment.compile(rule.expression).eval(data={"self": value}).value() is not True:
            found.append(_told(path, rule))
    return found


def _rules(path: str, part: Any) -> Iterator[tuple[str, Rule, Any]]:
    """(path, rule, object) of every rule that stands on a part of the object or below it."""
    if isinstance(part, Spec):
        value = present(part)
        for rule in type(part).rules:
            yield path, rule, value
        for name in _held(part):
            alias = type(part).model_fields[name].alias or name
            yield from _rules(f"{path}.{alias}", getattr(part, name))
    elif isinstance(part, list):
        for index, item in enumerate(part):
            yield from _rules(f"{path}[{index}]", item)


def present(part: Any) -> Any:
    """A part as the API server stores it: what was written, and the CRD's defaults."""
    if isinstance(part, BaseModel):
        fields = type(part).model_fields
        return {fields[name].alias or name: present(getattr(part, name)) for name in _held(part)}
    if isinstance(part, list):
        return [present(item) for item in part]
    return part


def _held(part: BaseModel) -> list[str]:
    """Fields that the stored object has: a default made by a factory is ours, not the CRD's."""
    return [
        name
        for name, field in type(part).model_fields.items()
        if getattr(part, name) is not None and (name in part.model_fields_set or field.default_factory is None)
    ]


def _told(path: str, rule: Rule) -> str:
    at = ".".join(part for part in (path, rule.field) if part)
    return f"{at}: {rule.message}" if at else rule.message
