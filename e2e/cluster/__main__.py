"""Commands of the embedded cluster: `python3 -m e2e.cluster up|images|deploy|down`."""

from __future__ import annotations

import argparse
import fcntl
import sys
import time

from e2e.cluster.layout import KUBECONFIG, LOCK, MACHINE
from e2e.cluster.progress import Refused, say


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m e2e.cluster", description=__doc__)
    parser.add_argument("command", choices=["up", "down"])
    command = parser.parse_args().command
    started = time.monotonic()
    try:
        with _only_one():
            if command == "up":
                from e2e.cluster.up import up

                if up():
                    say(f"cluster is up after {time.monotonic() - started:.1f}s: export KUBECONFIG={KUBECONFIG}")
    except Refused as refusal:
        print(f"cluster: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _only_one():
    MACHINE.mkdir(parents=True, exist_ok=True)
    lock = LOCK.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("  waiting for another cluster command on this machine ...")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


if __name__ == "__main__":
    sys.exit(main())
