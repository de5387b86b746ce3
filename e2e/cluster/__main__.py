"""Commands of the embedded cluster: `python3 -m e2e.cluster up|images|deploy|down|binaries`."""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from e2e.cluster import deploy, down, images, preflight, programs, up
from e2e.cluster.layout import KUBECONFIG, MACHINE
from e2e.cluster.progress import Refused, say
from e2e.cluster.target import Target, check_reachable, require_registry, target

COMMANDS = {
    "up": "start the cluster",
    "images": "build the images and bring them to the cluster",
    "deploy": "install the chart with these images",
    "down": "stop the cluster and remove all that it left but the cache",
    "binaries": "install and build the cluster's programs, start nothing",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m e2e.cluster",
        description="A real single-node Kubernetes without Docker.",
        epilog="\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.add_argument("--any-clone", action="store_true", help="down: also the cluster that another clone started")
    arguments = parser.parse_args()
    command = arguments.command
    try:
        if command == "down":
            with _only_one():
                say("cluster is down" if down.down(arguments.any_clone) else "this clone has no cluster")
        elif command == "binaries":
            if programs.missing_packages() or programs.stale_modules():
                with _only_one():
                    preflight.check_programs()
                    programs.install()
        else:
            _run(command, target())
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(command: str, cluster: Target) -> None:
    """Each command includes the ones before it, and each costs next to nothing when there is nothing to do."""
    started = time.monotonic()
    if cluster.embedded:
        with _only_one():
            changed = up.up()
        if changed or command == "up":
            say(f"cluster is up ({time.monotonic() - started:.1f}s): export KUBECONFIG={KUBECONFIG}")
    else:
        say(f"using the cluster {check_reachable(cluster)} of {cluster.kubeconfig}")
    if command in ("images", "deploy"):
        require_registry(cluster)
        if images.ensure(images.PRODUCT if cluster.embedded else images.OWN, cluster):
            say(f"images are ready ({time.monotonic() - started:.1f}s)")
        if not cluster.embedded:
            say(f"chart values with these images: {deploy.write_image_values(cluster)}")
    if command == "deploy":
        with _only_one("deploy") if cluster.embedded else nullcontext():
            if deploy.deploy(cluster):
                say(f"deployed ({time.monotonic() - started:.1f}s)")


@contextmanager
def _only_one(what: str = "cluster") -> Iterator[None]:
    """One such command at a time on this machine; a killed one lets go by itself."""
    preflight.require_root()
    MACHINE.mkdir(parents=True, exist_ok=True)
    with (MACHINE / f"{what}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"  waiting for another {what} command on this machine ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
