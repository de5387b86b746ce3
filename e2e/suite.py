"""`make test`: every check, the quick ones first, while a cold machine builds cluster and images beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from e2e.cluster.layout import CACHE
from e2e.cluster.progress import say
from e2e.cluster.target import target

STEPS = ("lint", "types", "generated", "chart", "unit", "integration", "deploy", "e2e")
BUILD_LOG = CACHE / "log" / "background-build.log"


def main() -> int:
    BUILD_LOG.parent.mkdir(parents=True, exist_ok=True)
    building = _build_in_background()
    started = time.monotonic()
    times: list[str] = []
    try:
        for step in STEPS:
            if step == "deploy" and building and building.poll() is None:
                say(f"== waiting for the images (log: {BUILD_LOG})")
                building.wait()  # a failure shows itself again, and in full, in the deploy
            say(f"== {step}")
            begun = time.monotonic()
            failed = subprocess.run(["make", step], check=False).returncode != 0
            times.append(f"{step} {time.monotonic() - begun:.0f}s")
            if failed:
                say(f"== {step} FAILED ({', '.join(times)})")
                return 1
    finally:
        if building and building.poll() is None:
            os.killpg(building.pid, signal.SIGTERM)
            building.wait()
    say(f"== all passed in {time.monotonic() - started:.0f}s ({', '.join(times)})")
    return 0


def _build_in_background() -> subprocess.Popen[bytes] | None:
    """Builds are mostly downloads and writing; they cost the quick checks little and save the minutes they take."""
    if not target().embedded:
        return None
    with BUILD_LOG.open("wb") as log:
        command = [sys.executable, "-m", "e2e.cluster", "images"]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


if __name__ == "__main__":
    sys.exit(main())
