"""The file through which the agent tells the middleware which digest answers for which name.

Standard library only: it is imported inside the engine's process, whose image we do not choose.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: The engine's own name of the base model. Reserved: no adapter may be called so.
BASE = "base"

DIGEST12 = re.compile(r"[0-9a-f]{12}")


def engine_name(name: str, digest: str) -> str:
    """`support-bot`, `sha256:3f9a...` -> `support-bot@3f9a1c20b7de`.

    The engine's names carry the digest so that one name never means two sets of weights: vLLM keeps prefix-cache
    blocks by name (vllm#42125).
    """
    return f"{name}@{digest.removeprefix('sha256:')[:12]}"


@dataclass(frozen=True)
class Route:
    """One of the adapters that answer for a name. Weights of a name are relative to their sum."""

    model: str
    weight: int
    #: Set while this is a canary: its failures are counted under this name.
    trial: str = ""


@dataclass(frozen=True)
class Aliases:
    """Which engine names stand behind each stable name, and in which engine process that was verified."""

    boot: str = ""
    ready: bool = False
    message: str = "the agent has not reported yet"
    names: tuple[str, ...] = ()
    routes: dict[str, tuple[Route, ...]] = field(default_factory=dict)
    #: engine name -> what the probe measured in this boot; a restarted agent takes it over instead of probing again.
    verified: dict[str, float] = field(default_factory=dict)

    def choose(self, name: str, draw: float) -> str | None:
        """The engine name for one request; `draw` is uniform in [0, 1). None when nothing verified answers yet."""
        routes = self.routes.get(name, ())
        total = sum(route.weight for route in routes)
        if not routes or total <= 0:
            return None
        mark = draw * total
        for route in routes:
            mark -= route.weight
            if mark < 0:
                return route.model
        return routes[-1].model

    def trial_of(self, model: str) -> str:
        """The trial that an engine name is on; empty for all but a canary."""
        return next((r.trial for routes in self.routes.values() for r in routes if r.model == model), "")

    def stable(self, name: str) -> str | None:
        """The engine name that answers for what a canary could not."""
        return next((r.model for r in self.routes.get(name, ()) if not r.trial and r.weight > 0), None)

    def dumps(self) -> str:
        document = {
            "boot": self.boot,
            "ready": self.ready,
            "message": self.message,
            "names": list(self.names),
            "routes": {name: [asdict(route) for route in routes] for name, routes in self.routes.items()},
            "verified": self.verified,
        }
        return json.dumps(document, indent=1, sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> Aliases:
        document: dict[str, Any] = json.loads(text)
        return cls(
            boot=document["boot"],
            ready=document["ready"],
            message=document["message"],
            names=tuple(document["names"]),
            routes={name: tuple(Route(**r) for r in routes) for name, routes in document["routes"].items()},
            verified=document["verified"],
        )


def write_aliases(path: Path, aliases: Aliases) -> None:
    """Replaces the file in one step: a reader sees the old mapping or the new one, never half of either."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(aliases.dumps(), encoding="utf-8")
    os.replace(draft, path)


class AliasFile:
    """Reads the mapping again only when the file was replaced; a request costs one `stat`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._aliases = Aliases()

    def read(self) -> Aliases:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return self._aliases
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen != self._seen:
            self._aliases = Aliases.loads(self._path.read_text(encoding="utf-8"))
            self._seen = seen
        return self._aliases
