"""What a case does with one object: apply, edit, watch, look at what it owns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from e2e.demo.explain import explain
from e2e.kubectl import Kubectl, Object, WaitTimeout, condition, is_true

T = TypeVar("T")

# A run of seconds waits for two pods to start, and on two cores perhaps for other tests' pods.
RUN_LIMIT = 300.0
SERVING_LIMIT = 420.0


@dataclass(frozen=True)
class Handle:
    """One FineTune or AdapterDeployment on the cluster."""

    kubectl: Kubectl
    kind: str
    name: str
    namespace: str

    def get(self) -> Object:
        return self.kubectl.get(self.kind, self.name, "-n", self.namespace)

    @property
    def status(self) -> Object:
        return dict(self.get().get("status") or {})

    def patch(self, spec: Object) -> None:
        change = json.dumps({"spec": spec})
        self.kubectl.run("patch", self.kind, self.name, "-n", self.namespace, "--type=merge", "-p", change)

    def delete(self) -> None:
        self.kubectl.run("delete", self.kind, self.name, "-n", self.namespace, "--wait=false")

    def owned(self, resource: str) -> list[Object]:
        return self.kubectl.items(resource, "-n", self.namespace, "-l", f"finetune.dev/{self.kind}={self.name}")

    def stages(self) -> list[str]:
        """The stage of every Job that is there."""
        return sorted(job["metadata"]["labels"]["finetune.dev/stage"] for job in self.owned("jobs"))

    def wait(self, what: str, ready: Callable[[Object], T | None], timeout: float = RUN_LIMIT) -> T:
        """Watch the object until `ready` answers; a failure nobody waits for ends the wait at once."""
        started = time.monotonic()

        def decided(objects: dict[str, Object]) -> T | None:
            found = objects.get(self.name)
            if found is None:
                return None
            answer = ready(found)
            if (answer is None or answer is False) and is_true(found, "Failed"):
                raise AssertionError(f"failed while waiting for {what}\n{self.explain()}")
            return answer

        selection = (self.kind, "-n", self.namespace, "--field-selector", f"metadata.name={self.name}")
        try:
            answer = self.kubectl.wait_until(*selection, ready=decided, timeout=timeout, what=f"{self}: {what}")
        except WaitTimeout as late:
            raise AssertionError(f"{late}\n{self.explain()}") from late
        print(f"    {self}: {what} after {time.monotonic() - started:.1f} s", flush=True)
        return answer

    def wait_true(self, kind: str, timeout: float = RUN_LIMIT) -> Object:
        return self.wait(f"{kind}=True", lambda found: found if is_true(found, kind) else None, timeout)

    def wait_phase(self, phase: str, timeout: float = RUN_LIMIT) -> Object:
        return self.wait(
            f"phase {phase}", lambda found: found if found.get("status", {}).get("phase") == phase else None, timeout
        )

    def wait_step(self, least: int, timeout: float = RUN_LIMIT) -> Object:
        def reached(found: Object) -> Object | None:
            return found if (found.get("status", {}).get("progress") or {}).get("step", 0) >= least else None

        return self.wait(f"step {least}", reached, timeout)

    def wait_failed(self, timeout: float = RUN_LIMIT) -> Object:
        """The Failed condition."""

        def failed(found: Object) -> Object | None:
            if is_true(found, "Complete"):
                raise AssertionError(f"{self} completed, though it should have failed")
            return condition(found, "Failed") if is_true(found, "Failed") else None

        return self.wait("Failed=True", failed, timeout)

    def explain(self) -> str:
        return explain(self.kubectl, self.kind, self.name, self.namespace, log_lines=40)

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"
