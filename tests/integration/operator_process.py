"""The operator as a real process against the API server of the tests, with exactly the rights that the chart gives it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .apiserver import BINARIES, ApiError, ApiServer, Client, Object

CHART = Path(__file__).resolve().parents[2] / "charts" / "finetune-operator"
NAMESPACE = "finetune-system"
START_SECONDS = 60.0


def until(holds: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Polls until `holds` answers something true, and returns that."""
    deadline = time.monotonic() + seconds
    while True:
        answer = holds()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


def install_rights(kube: Client) -> None:
    """The chart's service account, roles, admission policy and Services, once."""
    helm = str(BINARIES / "helm") if os.access(BINARIES / "helm", os.X_OK) else shutil.which("helm")
    assert helm, f"no Helm: neither {BINARIES / 'helm'} nor one on PATH"
    command = [helm, "template", "finetune-operator", str(CHART), "--namespace", NAMESPACE]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wanted = {
        "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Service",
        "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding",
    }  # fmt: skip
    objects = [d for d in yaml.load_all(rendered, Loader=yaml.CSafeLoader) if d and d["kind"] in wanted]
    for document in [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}, *objects]:
        try:
            kube.create(document)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise


def service_account_token(kube: Client, account: str = "finetune-operator") -> str:
    path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    return str(kube.request("POST", path, request)["status"]["token"])


def service_account_kubeconfig(server: ApiServer, folder: Path, account: str = "finetune-operator") -> Path:
    """A kubeconfig that holds nothing but a token of the operator's service account."""
    config = yaml.safe_load(server.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": service_account_token(server.client, account)}
    file = folder / "operator.kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return file


def free_port() -> int:
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return int(candidate.getsockname()[1])


class Operator:
    """One replica. Its log is at `log`; `settings` replaces top-level fields of the settings file."""

    def __init__(self, folder: Path, kubeconfig: Path, pod: str = "operator-0", **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "operator.log"
        self.health_port, self.report_port = free_port(), free_port()
        self._settings = folder / "settings.yaml"
        self._settings.write_text(
            yaml.safe_dump(
                {
                    "images": {"trainer": "trainer:1", "agent": "agent:1", "engine": "engine:1"},
                    "storage": {"uri": "s3://finetune", "endpoint": "http://minio.finetune-system:9000"},
                    "healthPort": self.health_port,
                    "reports": {"port": self.report_port},
                    **settings,
                }
            )
        )
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "POD_NAMESPACE": NAMESPACE,
            "POD_NAME": pod,
            "POD_IP": "10.0.0.5",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Operator":
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "finetune_operator", "--config", str(self._settings)],
                env=self._environment,
                stderr=log,
            )
        return self

    def leading(self) -> bool:
        return self.ready() == "leading\n"

    def ready(self) -> str | None:
        """What /readyz answers; None while there is no answer, or a bad one."""
        assert self._process is not None
        assert self._process.poll() is None, f"the operator ended: {self.log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/readyz", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return None

    def wait_until_leading(self) -> "Operator":
        until(self.leading, "the operator leads", START_SECONDS)
        return self

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def report(self, path: str, token: str, body: Object) -> tuple[int, Object]:
        """POSTs a report; returns the status and the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.report_port}{path}",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def terminate(self) -> float:
        """SIGTERM; returns how long it took to leave."""
        began = time.monotonic()
        assert self._process is not None
        self._process.terminate()
        self._process.wait(timeout=20)
        return time.monotonic() - began

    def wait(self) -> int:
        """For a replica that leaves by itself: its exit code."""
        assert self._process is not None
        return self._process.wait(timeout=START_SECONDS)

    def kill(self) -> None:
        """SIGKILL, as a lost node does it."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
