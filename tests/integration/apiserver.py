"""A kube-apiserver with its etcd, started for a test session and gone with it, and a raw-JSON client for it.

No controllers, scheduler or kubelet run: objects stay as they are written, and tests play the other parts themselves
(for instance by setting a Job's status).
"""

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.parse
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

BINARIES = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune-operator" / "bin"
ADMIN_TOKEN = "integration-tests-admin"
START_ATTEMPTS = 3
START_SECONDS = 60


def missing_programs() -> list[str]:
    """What must be installed or built before an ApiServer can start."""
    missing = [] if (BINARIES / "kube-apiserver").exists() else [f"{BINARIES}/kube-apiserver (make cluster-binaries)"]
    return missing + [
        f"{program} (Debian package of that name)" for program in ("etcd", "openssl") if not shutil.which(program)
    ]


class ApiError(Exception):
    """The API server's refusal."""

    def __init__(self, status: int, body: Object) -> None:
        self.status = status
        self.reason = body.get("reason", "")
        self.message = body.get("message", "")
        self.causes = (body.get("details") or {}).get("causes", [])
        super().__init__(f"{status} {self.reason}: {self.message}")


class Client:
    """JSON in, JSON out, over one connection (not for several threads). Paths are those of the REST API."""

    def __init__(self, server: str, ca_file: Path, token: str) -> None:
        self.server, self.ca_file, self.token = server, ca_file, token
        self._connection = http.client.HTTPSConnection(
            server.removeprefix("https://"), context=ssl.create_default_context(cafile=str(ca_file)), timeout=30
        )

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        **query: str,
    ) -> Object:
        url = path + (f"?{urllib.parse.urlencode(query)}" if query else "")
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": content_type, "Accept": accept}
        try:
            self._connection.request(method, url, None if body is None else json.dumps(body), headers)
            response = self._connection.getresponse()
            text = response.read().decode()
        except (http.client.HTTPException, OSError):
            self._connection.close()  # the next request opens a new one
            raise
        answer = json.loads(text) if text.startswith("{") else {"message": text}
        if response.status >= 400:
            raise ApiError(response.status, answer)
        return dict(answer)

    def get(self, path: str, **query: str) -> Object:
        return self.request("GET", path, **query)

    def create(self, obj: Object, dry_run: bool = False) -> Object:
        """POST to the object's collection; unknown fields are errors, as with kubectl."""
        query = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self.request("POST", collection(obj), obj, **query)

    def merge(self, obj: Object, patch: Object, subresource: str = "", dry_run: bool = False) -> Object:
        """JSON merge patch of an object that exists, or of its status."""
        path = f"{collection(obj)}/{obj['metadata']['name']}" + (f"/{subresource}" if subresource else "")
        query = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self.request("PATCH", path, patch, "application/merge-patch+json", **query)

    def delete(self, obj: Object) -> None:
        self.request("DELETE", f"{collection(obj)}/{obj['metadata']['name']}")


# Kinds whose plural is not the lower-case kind with an s.
PLURALS = {
    "endpointslice": "endpointslices",
    "networkpolicy": "networkpolicies",
    "priorityclass": "priorityclasses",
    "validatingadmissionpolicy": "validatingadmissionpolicies",
}
CLUSTER_SCOPED = {
    "Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "Node", "PriorityClass",
    "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding",
}  # fmt: skip


def collection(obj: Object) -> str:
    """REST path of the collection that an object belongs to."""
    group_version, kind = obj["apiVersion"], obj["kind"]
    root = f"/apis/{group_version}" if "/" in group_version else f"/api/{group_version}"
    plural = PLURALS.get(kind.lower(), f"{kind.lower()}s")
    if kind in CLUSTER_SCOPED:
        return f"{root}/{plural}"
    return f"{root}/namespaces/{obj['metadata'].get('namespace', 'default')}/{plural}"


class ApiServer:
    """etcd and kube-apiserver on free ports of 127.0.0.1, with all state in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Returns when /readyz is ok. Somebody else may take a port before we listen on it: then once more."""
        (self.folder / "tokens.csv").write_text(f'{ADMIN_TOKEN},admin,admin,"system:masters"\n')
        self._service_account_key()
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start()
                return
            except RuntimeError:
                self.stop()
                if attempt == START_ATTEMPTS:
                    raise

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.kill()
            process.wait()
        self.processes.clear()

    @property
    def client(self) -> Client:
        return Client(self.url, self.folder / "certs" / "apiserver.crt", ADMIN_TOKEN)

    def _start(self) -> None:
        etcd_port, etcd_peer_port, self.port = _free_ports(3)
        self.url = f"https://127.0.0.1:{self.port}"
        etcd_url, peer_url = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{etcd_peer_port}"
        data = self.folder / "etcd"
        shutil.rmtree(data, ignore_errors=True)
        self._run(
            "etcd",
            "etcd",
            f"--data-dir={data}",
            f"--listen-client-urls={etcd_url}",
            f"--advertise-client-urls={etcd_url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
            "--log-level=error",
        )
        self._run(
            "kube-apiserver",
            str(BINARIES / "kube-apiserver"),
            f"--etcd-servers={etcd_url}",
            f"--cert-dir={self.folder / 'certs'}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=RBAC",
            "--anonymous-auth=false",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            # No controller makes the default service accounts that this plugin asks for.
            "--disable-admission-plugins=ServiceAccount",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={self.folder / 'service-account.key'}",
            f"--service-account-signing-key-file={self.folder / 'service-account.key'}",
            "--profiling=false",
            "--v=0",
        )
        self._wait_until_ready()
        self._write_kubeconfig()

    def _run(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            # A test run that is killed takes its servers along.
            tied = ("setpriv", "--pdeathsig", "KILL", *command)
            self.processes[name] = subprocess.Popen(tied, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.returncode}: {self._newest_logs()}")
            try:
                self.client.get("/readyz")
                self.client.get("/api/v1/namespaces/default")
                return
            except (OSError, http.client.HTTPException, ApiError):
                time.sleep(0.05)
        raise RuntimeError(f"kube-apiserver is not ready after {START_SECONDS} s: {self._newest_logs()}")

    def _newest_logs(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-1500:] for log in sorted(self.folder.glob("*.log")))

    def _service_account_key(self) -> None:
        key = self.folder / "service-account.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)

    def _write_kubeconfig(self) -> None:
        cluster = {"server": self.url, "certificate-authority": str(self.client.ca_file)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "integration", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": ADMIN_TOKEN}}],
            "contexts": [{"name": "integration", "context": {"cluster": "integration", "user": "admin"}}],
            "current-context": "integration",
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for candidate in sockets:
            candidate.bind(("127.0.0.1", 0))
        return [candidate.getsockname()[1] for candidate in sockets]
    finally:
        for candidate in sockets:
            candidate.close()
