"""The settings of another tool's file: each is read, answered with a warning, or refused; none is dropped silently."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, overload

_EXPONENT = re.compile(r"^[0-9.]+[eE][-+]?[0-9]+$")
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class CannotImport(Exception):
    """A setting without which the result would be another one, and that a FineTune cannot have."""


class Settings:
    """A mapping that remembers what of it was used. Null, false and empty values are settings that nobody made."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values, self.path = dict(values), path
        self.warnings: list[str] = []
        self._read: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a setting as it was written, or the other tool's own default."""
        self._read.add(name)
        value = self.values.get(name)
        if isinstance(value, str) and _EXPONENT.match(value):
            return float(value)  # PyYAML reads 2e-4 as text, because YAML 1.1 wants 2.0e-4
        return default if value is None or value == "" else value

    @overload
    def number(self, name: str, default: float) -> float: ...
    @overload
    def number(self, name: str, default: None = None) -> float | None: ...
    def number(self, name: str, default: float | None = None) -> float | None:
        """A finite number, which may be written as text."""
        value = self.take(name)
        if value is None or value is False:
            return default
        try:
            found = math.nan if value is True else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise self.refuse(name, "a number is expected")
        return value if isinstance(value, int) else found

    @overload
    def count(self, name: str, default: int) -> int: ...
    @overload
    def count(self, name: str, default: None = None) -> int | None: ...
    def count(self, name: str, default: int | None = None) -> int | None:
        """A whole number."""
        found = self.number(name, default)
        if found is not None and found != int(found):
            raise self.refuse(name, "a whole number is expected")
        return None if found is None else int(found)

    def text(self, name: str, default: str = "") -> str:
        """One word or line; a number stands for its digits."""
        value = self.take(name, default)
        if isinstance(value, bool | list | dict):
            raise self.refuse(name, "text is expected")
        return str(value)

    def flag(self, name: str, default: bool | None = None) -> bool | None:
        """true or false."""
        value = self.take(name, default)
        known = _SWITCHES.get(value.lower()) if isinstance(value, str) else value
        if value is not None and not isinstance(known, bool):
            raise self.refuse(name, "true or false is expected")
        return known

    def names(self, name: str) -> list[str]:
        """Names in a list, or in one text with commas."""
        value = self.take(name, [])
        found = value.split(",") if isinstance(value, str) else value
        if not isinstance(found, list) or any(isinstance(one, list | dict) or one is None for one in found):
            raise self.refuse(name, "a list of names is expected")
        return [text for one in found if (text := str(one).strip())]

    def part(self, name: str) -> Settings:
        """The settings below a setting."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self.refuse(name, "settings of its own are expected (name: value)")
        return Settings(value, f"{self.path}{name}.")

    def parts(self, name: str) -> list[Settings]:
        """The settings of each entry of a list."""
        value = self.take(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.refuse(name, "a list is expected, each entry with settings of its own (- name: value)")
        return [Settings(entry, f"{self.path}{name}[{at}].") for at, entry in enumerate(value)]

    def first(self, *names: str) -> Any:
        """The value of the first of some names for one thing that has one."""
        found = [value for name in names if (value := self.take(name)) is not None]
        return found[0] if found else None

    def first_number(self, *names: str) -> float | None:
        """The number under the first of some names for one thing that has one."""
        found = [value for name in names if (value := self.number(name)) is not None]
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

    def finish(self, part: Settings) -> None:
        """Tell what a part of these settings has to tell, when all of it was read that is known."""
        part.warn_of_the_rest()
        self.warnings += part.warnings

    def _shown(self, name: str) -> str:
        if name not in self.values:
            return f"{self.path}{name}"
        value = repr(self.values[name])
        return f"{self.path}{name}: {value if len(value) <= 80 else value[:77] + '...'}"


def without_nothing(part: dict[str, Any]) -> dict[str, Any]:
    """The part of an object without what is absent, recursively."""
    kept = {key: without_nothing(value) if isinstance(value, dict) else value for key, value in part.items()}
    return {key: value for key, value in kept.items() if value not in (None, "", {}, [])}
