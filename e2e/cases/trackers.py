"""A pod with a fake MLflow and a fake Weights & Biases, and what they have."""

from __future__ import annotations

import json

from e2e.cases.objects import config_map
from e2e.cluster.layout import REPO, SYSTEM_NAMESPACE
from e2e.kubectl import Kubectl, Object

NAME = "trackers"
PORTS = {"mlflow": 5000, "wandb": 8080}
SERVERS = REPO / "tests" / "tracking_servers.py"


def start_trackers(kubectl: Kubectl, namespace: str) -> dict[str, str]:
    """The address of each, as pods see it."""
    # Any image with Python will do, and the operator's is on every cluster under test.
    operator = kubectl.get("deployment", "finetune-operator", "-n", SYSTEM_NAMESPACE)["spec"]["template"]["spec"]
    pod = _pod(namespace, operator["containers"][0]["image"])
    pod["spec"]["imagePullSecrets"] = operator.get("imagePullSecrets") or []
    kubectl.apply(config_map(NAME, namespace, {"servers.py": SERVERS.read_text()}), pod, _service(namespace))
    kubectl.run("wait", "--for=condition=Ready", f"pod/{NAME}", "-n", namespace, "--timeout=60s")
    return {kind: f"http://{NAME}.{namespace}.svc:{port}" for kind, port in PORTS.items()}


def what_it_has(kubectl: Kubectl, namespace: str, kind: str) -> Object:
    found: Object = json.loads(kubectl.run("logs", NAME, "-c", kind, "-n", namespace, "--tail=1"))
    return found


def _pod(namespace: str, image: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": NAME, "namespace": namespace, "labels": {"app": NAME}},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": kind,
                    "image": image,
                    "command": ["python3", "/srv/servers.py", kind, str(port)],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
                    "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
                    "volumeMounts": [{"name": "servers", "mountPath": "/srv"}],
                }
                for kind, port in PORTS.items()
            ],
            "volumes": [{"name": "servers", "configMap": {"name": NAME}}],
        },
    }


def _service(namespace: str) -> Object:
    ports = [{"name": kind, "port": port} for kind, port in PORTS.items()]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME, "namespace": namespace},
        "spec": {"selector": {"app": NAME}, "ports": ports},
    }
