"""The settings of another tool's file: each is read, answered with a warning, or refused; none is dropped silently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_EXPONENT = re.compile(r"^[0-9.]+[eE][-+]?[0-9]+$")


class CannotImport(Exception):
    """A setting without which the result would be another one, and that a FineTune cannot have."""


class Settings:
    """A mapping that remembers what of it was used. Null, false and empty values are settings that nobody made."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values, self.path = dict(values), path
        self.warnings: list[str] = []
        self._read: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a setting, or the other tool's own default."""
        self._read.add(name)
        value = self.values.get(name)
        if isinstance(value, str) and _EXPONENT.match(value):
            return float(value)  # PyYAML reads 2e-4 as text, because YAML 1.1 wants 2.0e-4
        return default if value is None or value == "" else value

    def first(self, *names: str) -> Any:
        """The value of the first of some names for one thing that has one."""
        found = [value for name in names if (value := self.take(name)) is not None]
        return found[0] if found else None

    def warn(self, name: str, why: str) -> None:
        """Say what becomes of a setting that is made."""
        self._read.add(name)
        if self.values.get(name):
            self.warnings.append(f"{self._shown(name)}: {why}")

    def refuse(self, name: str, why: str) -> CannotImport:
        """The error of a setting that would change the result."""
        return CannotImport(f"{self._shown(name)}: {why}")

    def refuse_if_set(self, names: Mapping[str, str]) -> None:
        for name, why in names.items():
            if self.take(name):
                raise self.refuse(name, why)

    def one_of(self, name: str, known: Mapping[str, str], default: str) -> str:
        """The FineTune's word for a setting's word."""
        word = str(self.take(name, default))
        if word not in known:
            raise self.refuse(name, f"a FineTune has no such thing; it has {', '.join(dict.fromkeys(known.values()))}")
        return known[word]

    def warn_of_the_rest(self) -> None:
        """What nobody asked for is not known here: it may or may not matter."""
        for name, value in self.values.items():
            if name not in self._read and value:
                self.warnings.append(f"{self._shown(name)}: unknown to finetune import; check whether it matters")

    def _shown(self, name: str) -> str:
        return f"{self.path}{name}: {self.values.get(name)!r}" if name in self.values else f"{self.path}{name}"


def without_nothing(part: dict[str, Any]) -> dict[str, Any]:
    """The part of an object without what is absent, recursively."""
    kept = {key: without_nothing(value) if isinstance(value, dict) else value for key, value in part.items()}
    return {key: value for key, value in kept.items() if value not in (None, {}, [])}
