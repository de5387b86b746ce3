"""What the user sees: one line a step with its time, and one clear line when something is refused."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Refused(Exception):
    """Something the user has to change first; its text is the one line that is printed."""


def say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def step(what: str, log: Path | None = None) -> Iterator[None]:
    """Announce `what` and, once done, the time it took. On a failure say where the log is."""
    where = f" (log: {log})" if log else ""
    interactive = sys.stdout.isatty()
    print(f"  {what} ..." + ("" if interactive else where), end="" if interactive else "\n", flush=True)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print(
            f"{' ' if interactive else '  ' + what + ' '}failed after {time.monotonic() - started:.1f}s{where}",
            flush=True,
        )
        raise
    print(f"{' ' if interactive else '  ' + what + ' '}done in {time.monotonic() - started:.1f}s", flush=True)
