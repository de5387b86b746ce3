"""A pod that serves files to the Jobs under test: the fake hub, which is a plain web server too."""

from __future__ import annotations

import io
import tarfile

from e2e.cases.objects import config_map
from e2e.cluster.layout import REPO, SYSTEM_NAMESPACE
from e2e.kubectl import Kubectl, Object
from e2e.storage import address_in_cluster, open_storage, put

NAME = "hub"
BUCKET = "datasets"
PORT = 8088
SERVER = REPO / "tests" / "hub_server" / "server.py"
FETCH = """
import sys, tarfile, urllib.request
with urllib.request.urlopen(sys.argv[1]) as archive:
    tarfile.open(fileobj=archive, mode="r|").extractall("/data")
"""


def start_hub(kubectl: Kubectl, namespace: str, files: dict[str, bytes]) -> str:
    """Serve `files` (by path, laid out as tests/hub_server says); returns the address as pods see it."""
    # Any image with Python will do, and the operator's is on every cluster under test.
    operator = kubectl.get("deployment", "finetune-operator", "-n", SYSTEM_NAMESPACE)["spec"]["template"]["spec"]
    archive = f"{namespace}/hub.tar"
    with open_storage(kubectl) as storage:
        put(storage, BUCKET, archive, _tar(files))
    pod = _pod(namespace, operator["containers"][0]["image"], address_in_cluster(kubectl, BUCKET, archive))
    pod["spec"]["imagePullSecrets"] = operator.get("imagePullSecrets") or []
    kubectl.apply(config_map("hub-server", namespace, {"server.py": SERVER.read_text()}), pod, _service(namespace))
    kubectl.run("wait", "--for=condition=Ready", f"pod/{NAME}", "-n", namespace, "--timeout=60s")
    return f"http://{NAME}.{namespace}.svc:{PORT}"


def _tar(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _pod(namespace: str, image: str, archive: str) -> Object:
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
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
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "initContainers": [
                {
                    "name": "fetch",
                    "image": image,
                    "command": ["python3", "-c", FETCH, archive],
                    "securityContext": security,
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                }
            ],
            "containers": [
                {
                    "name": "hub",
                    "image": image,
                    "command": ["python3", "/srv/server.py", "--root=/data", "--host=0.0.0.0", f"--port={PORT}"],
                    "securityContext": security,
                    "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
                    "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
                    "volumeMounts": [{"name": "server", "mountPath": "/srv"}, {"name": "data", "mountPath": "/data"}],
                }
            ],
            "volumes": [{"name": "server", "configMap": {"name": "hub-server"}}, {"name": "data", "emptyDir": {}}],
        },
    }


def _service(namespace: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME, "namespace": namespace},
        "spec": {"selector": {"app": NAME}, "ports": [{"port": PORT}]},
    }
