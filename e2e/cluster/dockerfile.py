"""Reads from a Dockerfile which files a build stage depends on, so that an image's tag needs no list of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """The instructions up to the end of a stage, and the paths of the build context that they copy."""

    text: str
    sources: tuple[str, ...]


def stage(dockerfile: str, target: str | None = None) -> Stage:
    """The Dockerfile cut after the stage `target`; all of it when there is no target.

    Raises ValueError when there is no such stage.
    """
    instructions = _instructions(dockerfile)
    if target:
        starts = [i for i, line in enumerate(instructions) if re.match(r"FROM\s", line, re.IGNORECASE)]
        named = [i for i in starts if re.search(rf"\sAS\s+{re.escape(target)}$", instructions[i], re.IGNORECASE)]
        if not named:
            raise ValueError(f"the Dockerfile has no stage {target}")
        instructions = instructions[: min((i for i in starts if i > named[0]), default=len(instructions))]
    sources = []
    for line in instructions:
        keyword, *words = line.split()
        if keyword.upper() in ("COPY", "ADD") and not any(word.startswith("--from=") for word in words):
            sources += [word for word in words if not word.startswith("--")][:-1]
    return Stage("\n".join(instructions), tuple(sources))


def _instructions(dockerfile: str) -> list[str]:
    """One line an instruction: comments dropped, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [line.strip() for line in joined.splitlines() if line.strip()]
