"""The whole loop, seen: upload a base model and data, apply a FineTune and an AdapterDeployment, ask both models.

    python -m e2e.demo          # the embedded cluster, or the one that KUBECONFIG names

`make demo` runs it after the cluster, the images and the chart. A second run uses what is there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from e2e.cluster.layout import DEMO_NAMESPACE, REPO, SYSTEM_NAMESPACE
from e2e.cluster.progress import Refused, say, step
from e2e.demo.base_model import base_model
from e2e.demo.chat import Answer, AskFailed, ask, base_model_name
from e2e.demo.explain import explain
from e2e.demo.namespace import prepare_namespace
from e2e.kubectl import Kubectl, KubectlFailed, Object, WaitTimeout, is_true
from e2e.storage import open_storage, upload_folder

QUESTION = "What colour is the Zorblax router's light when it has no link?"
NAME = "support-bot"
DATA = Path(__file__).with_name("data")
EXAMPLES = REPO / "examples"
TRAINING_LIMIT = 900.0
SERVING_LIMIT = 600.0


def main() -> int:
    started = time.monotonic()
    kubectl = Kubectl()
    try:
        check_operator(kubectl)
        prepare_namespace(kubectl, DEMO_NAMESPACE)
        upload(kubectl)
        train(kubectl)
        serve(kubectl)
        base, tuned = compare(kubectl)
    except (Refused, KubectlFailed, AskFailed) as failure:
        say(f"\ndemo: {failure}")
        return 1
    except KeyboardInterrupt:
        say(f"\ndemo: interrupted; what runs goes on: kubectl get finetunes,adapterdeployments -n {DEMO_NAMESPACE}")
        return 130
    say("")
    say(f"  question         {QUESTION}")
    say(f"  base model       {base.text}")
    say(f"  after the tune   {tuned.text}")
    say(f"  answered by      {tuned.model}")
    say("")
    say(kubectl.run("get", "finetunes,adapterdeployments", "-n", DEMO_NAMESPACE))
    say(f"Done in {time.monotonic() - started:.0f} s. The cluster stays up:  export KUBECONFIG={kubectl.kubeconfig}")
    return 0


def check_operator(kubectl: Kubectl) -> None:
    try:
        kubectl.run(
            "rollout", "status", "deployment/finetune-operator", "-n", SYSTEM_NAMESPACE, "--timeout=180s", timeout=200
        )
    except KubectlFailed as failure:
        raise Refused(
            f"the operator is not running: {failure}\n"
            f"  look: kubectl logs deployment/finetune-operator -n {SYSTEM_NAMESPACE}; install it with `make deploy`"
        ) from failure


def upload(kubectl: Kubectl) -> None:
    model = base_model()
    with step("base model and data to the bucket"), open_storage(kubectl) as storage:
        upload_folder(storage, model, "models", "tiny-llama")
        upload_folder(storage, DATA, "datasets", NAME)


def train(kubectl: Kubectl) -> None:
    say(f"\n$ kubectl apply -f examples/finetune.yaml && kubectl get finetunes -n {DEMO_NAMESPACE} -w")
    kubectl.apply_file(EXAMPLES / "finetune.yaml")
    watch_until(kubectl, "finetune", "Complete", TRAINING_LIMIT)


def serve(kubectl: Kubectl) -> None:
    say(
        f"\n$ kubectl apply -f examples/adapterdeployment.yaml && kubectl get adapterdeployments -n {DEMO_NAMESPACE} -w"
    )
    kubectl.apply_file(EXAMPLES / "adapterdeployment.yaml")
    watch_until(kubectl, "adapterdeployment", "Ready", SERVING_LIMIT)


def watch_until(kubectl: Kubectl, kind: str, wanted: str, limit: float) -> None:
    """Show `kubectl get KIND --watch` until the condition `wanted` is True; refuse with an explanation otherwise."""
    if is_true(kubectl.find(kind, NAME, "-n", DEMO_NAMESPACE), wanted):
        say(kubectl.run("get", kind, NAME, "-n", DEMO_NAMESPACE).rstrip())
        return
    table = kubectl.popen("get", kind, NAME, "-n", DEMO_NAMESPACE, "--watch", stderr=subprocess.DEVNULL)

    def decided(objects: dict[str, Object]) -> bool | None:
        found = objects.get(NAME)
        if is_true(found, wanted):
            return True
        if is_true(found, "Failed") or ((found or {}).get("status", {}).get("phase") in ("Failed", "Blocked")):
            raise Refused(explain(kubectl, kind, NAME, DEMO_NAMESPACE))
        return None

    selection = (kind, "-n", DEMO_NAMESPACE, "--field-selector", f"metadata.name={NAME}")
    try:
        kubectl.wait_until(*selection, ready=decided, timeout=limit, what=f"{kind}/{NAME} {wanted}")
    except WaitTimeout as late:
        raise Refused(f"{late}\n{explain(kubectl, kind, NAME, DEMO_NAMESPACE)}") from late
    finally:
        table.terminate()
        table.wait()


def compare(kubectl: Kubectl) -> tuple[Answer, Answer]:
    with kubectl.port_forward(DEMO_NAMESPACE, f"service/{NAME}", 80) as address:
        return ask(address, base_model_name(address), QUESTION), ask(address, NAME, QUESTION)


if __name__ == "__main__":
    sys.exit(main())
