"""A pod that serves files to the Jobs under test: the fake hub, which is a plain web server too."""

from __future__ import annotations

import io
import subprocess
import tarfile

from e2e.cases.objects import config_map
from e2e.cluster.layout import REPO, SYSTEM_NAMESPACE
from e2e.kubectl import Kubectl, Object

NAME = "hub"
PORT = 8088
SERVER = REPO / "tests" / "hub_server" / "server.py"


def start_hub(kubectl: Kubectl, namespace: str, files: dict[str, bytes]) -> str:
    """Serve `files` (by path, laid out as tests/hub_server says); returns the address as pods see it."""
    # Any image with Python will do, and the operator's is on every cluster under test.
    operator = kubectl.get("deployment", "finetune-operator", "-n", SYSTEM_NAMESPACE)
    image = operator["spec"]["template"]["spec"]["containers"][0]["image"]
    pull_secrets = operator["spec"]["template"]["spec"].get("imagePullSecrets") or []
    kubectl.apply(
        config_map("hub-server", namespace, {"server.py": SERVER.read_text()}),
        _pod(namespace, image, pull_secrets),
        _service(namespace),
    )
    kubectl.run("wait", "--for=condition=Ready", f"pod/{NAME}", "-n", namespace, "--timeout=60s")
    unpack = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall('/data', filter='data')"
    copy = kubectl.popen(
        "exec",
        "-i",
        NAME,
        "-n",
        namespace,
        "--",
        "python3",
        "-c",
        unpack,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _, error = copy.communicate(_tar(files), timeout=120)
    assert copy.returncode == 0, f"copying the hub's files failed: {error.decode()}"
    return f"http://{NAME}.{namespace}.svc:{PORT}"


def _tar(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _pod(namespace: str, image: str, pull_secrets: list[Object]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": NAME, "namespace": namespace, "labels": {"app": NAME}},
        "spec": {
            "imagePullSecrets": pull_secrets,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "hub",
                    "image": image,
                    "command": [
                        "python3",
                        "/srv/server.py",
                        "--root",
                        "/data",
                        "--host",
                        "0.0.0.0",
                        "--port",
                        str(PORT),
                    ],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
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
