"""kubectl as the demo and the end-to-end tests use it: what a user would type, and watches instead of sleeps."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from e2e.cluster.target import target

Object = dict[str, Any]
T = TypeVar("T")


class KubectlFailed(Exception):
    """kubectl's own words."""


class WaitTimeout(Exception):
    """What was waited for did not come in time."""


class Kubectl:
    """Runs kubectl against the cluster under test."""

    def __init__(self) -> None:
        cluster = target()
        self.kubeconfig = cluster.kubeconfig
        self._command = cluster.kubectl()

    def run(self, *arguments: str, stdin: str | None = None, timeout: float = 120) -> str:
        done = subprocess.run(
            [*self._command, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode:
            raise KubectlFailed(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def popen(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([*self._command, *arguments], **options)

    def get(self, *arguments: str) -> Object:
        """One object, or a List."""
        found: Object = json.loads(self.run("get", *arguments, "-o", "json"))
        return found

    def find(self, *arguments: str) -> Object | None:
        """One object, or None where there is none."""
        text = self.run("get", *arguments, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def items(self, *arguments: str) -> list[Object]:
        return list(self.get(*arguments)["items"])

    def apply(self, *objects: Object) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.run("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(listed))

    def apply_file(self, path: Path) -> str:
        return self.run("apply", "-f", str(path))

    def watch(self, *arguments: str, timeout: float) -> Iterator[tuple[str, Object]]:
        """("ADDED" | "MODIFIED" | "DELETED", object) for what matches now and what comes; ends after `timeout` seconds.

        The API server may end a watch at any time; it is then started again.
        """
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            process = self.popen(
                "get", *arguments, "--watch", "--output-watch-events", "-o", "json",
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            timer = threading.Timer(left, process.kill)
            timer.start()
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                for line in process.stdout:
                    event = json.loads(line)
                    yield event["type"], event["object"]
                error = process.stderr.read().strip()
                if process.wait() not in (0, -9):
                    raise KubectlFailed(f"kubectl get {' '.join(arguments)} --watch: {error}")
            finally:
                timer.cancel()
                process.kill()
                process.wait()

    def wait_until(
        self, *arguments: str, ready: Callable[[dict[str, Object]], T | None], timeout: float, what: str
    ) -> T:
        """Watch what `arguments` select until `ready(objects by name)` is neither None nor False."""
        objects: dict[str, Object] = {}
        for kind, changed in self.watch(*arguments, timeout=timeout):
            name = changed["metadata"]["name"]
            if kind == "DELETED":
                objects.pop(name, None)
            else:
                objects[name] = changed
            answer = ready(objects)
            if answer is not None and answer is not False:
                return answer
        raise WaitTimeout(f"{what}: not within {timeout:.0f} s")

    def wait_gone(self, *arguments: str, timeout: float = 60) -> None:
        """Wait until nothing matches `arguments` any more."""
        self.run("wait", "--for=delete", *arguments, f"--timeout={timeout:.0f}s", timeout=timeout + 30)

    @contextmanager
    def port_forward(self, namespace: str, target: str, port: int) -> Iterator[str]:
        """`127.0.0.1:<free port>` that leads to `target` (e.g. service/minio)."""
        process = self.popen(
            "port-forward", "-n", namespace, "--address", "127.0.0.1", target, f":{port}",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            opened = re.search(r"127\.0\.0\.1:(\d+)", line)
            if opened is None:
                raise KubectlFailed(f"kubectl port-forward {namespace}/{target}: {line.strip()}")
            # kubectl prints a line for each connection: nobody reading would block it.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield f"127.0.0.1:{opened[1]}"
        finally:
            process.kill()
            process.wait()


def condition(resource: Object | None, kind: str) -> Object | None:
    """The condition of that type, or None."""
    conditions = (resource or {}).get("status", {}).get("conditions") or []
    return next((entry for entry in conditions if entry["type"] == kind), None)


def is_true(resource: Object | None, kind: str) -> bool:
    """Whether that condition is True for the object as it is now, not for an older edit of it."""
    found = condition(resource, kind)
    if resource is None or found is None or found["status"] != "True":
        return False
    return found.get("observedGeneration", 0) in (0, resource["metadata"].get("generation", 0))
