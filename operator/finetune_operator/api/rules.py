"""Cross-field rules in CEL, declared on the types and enforced by the API server (`x-kubernetes-validations`).

A message names the field, relative to the part of the object that the rule stands on, and says what to do. The API
server puts the full path in front of it.
"""

from dataclasses import dataclass
from typing import Literal

Reason = Literal["FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired", "FieldValueDuplicate"]


@dataclass(frozen=True)
class Rule:
    """`expression` is true of every valid object; `field` is the path below `self` that an error points to."""

    expression: str
    message: str
    field: str = ""
    reason: Reason = "FieldValueInvalid"

    def as_validation(self) -> dict[str, str]:
        """The entry of `x-kubernetes-validations`."""
        path = {"fieldPath": f".{self.field}"} if self.field else {}
        return {"rule": self.expression, "message": self.message, "reason": self.reason, **path}


def exactly_one(*fields: str) -> Rule:
    """One of these optional fields is set, and no other."""
    present = ", ".join(f"has(self.{field})" for field in fields)
    names = f"{', '.join(fields[:-1])} and {fields[-1]}"
    return Rule(f"[{present}].filter(set, set).size() == 1", f"give exactly one of {names}")


def only_with(field: str, condition: str, message: str) -> Rule:
    """An optional field may be set only while `condition` holds."""
    return Rule(f"!has(self.{field}) || {condition}", message, field=field, reason="FieldValueForbidden")
