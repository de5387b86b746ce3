"""Certificates and kubeconfigs of the cluster, made once with openssl."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import shell
from e2e.cluster.layout import API_SERVER, KUBECONFIG, KUBERNETES_SERVICE_IP, NODE, NODE_IP, PKI

DAYS = "3650"


@dataclass(frozen=True)
class Certificate:
    name: str
    subject: str
    hosts: tuple[str, ...] = ()
    kubeconfig: bool = False


CERTIFICATES = (
    Certificate(
        "apiserver",
        "/CN=kube-apiserver",
        (
            "IP:127.0.0.1",
            f"IP:{NODE_IP}",
            f"IP:{KUBERNETES_SERVICE_IP}",
            "DNS:localhost",
            "DNS:kubernetes",
            "DNS:kubernetes.default",
            "DNS:kubernetes.default.svc",
            "DNS:kubernetes.default.svc.cluster.local",
        ),
    ),
    Certificate("admin", "/O=system:masters/CN=admin", kubeconfig=True),
    Certificate("controller-manager", "/CN=system:kube-controller-manager", kubeconfig=True),
    Certificate("scheduler", "/CN=system:kube-scheduler", kubeconfig=True),
    Certificate("proxy", "/CN=system:kube-proxy", kubeconfig=True),
    # The API server reaches the kubelet by the node's address, so that must be in the kubelet's certificate.
    Certificate(
        "kubelet",
        f"/O=system:nodes/CN=system:node:{NODE}",
        ("IP:127.0.0.1", f"IP:{NODE_IP}", f"DNS:{NODE}"),
        kubeconfig=True,
    ),
    Certificate("front-proxy", "/CN=front-proxy"),
)


def ensure() -> bool:
    """Make everything unless it is there for these very names; True when it was made anew."""
    wanted = hashlib.sha256(repr((CERTIFICATES, API_SERVER, DAYS)).encode()).hexdigest()
    stamp = PKI / "stamp"
    if stamp.exists() and stamp.read_text() == wanted and KUBECONFIG.exists():
        return False
    shutil.rmtree(PKI, ignore_errors=True)
    PKI.mkdir(parents=True, mode=0o700)
    _authority()
    _service_account_key()
    for certificate in CERTIFICATES:
        _issue(certificate)
        if certificate.kubeconfig:
            _write_private(PKI / f"{certificate.name}.kubeconfig", _kubeconfig(certificate.name))
    _write_private(KUBECONFIG, _kubeconfig("admin"))
    stamp.write_text(wanted)
    return True


def _openssl(*arguments: str | Path) -> None:
    shell.output("openssl", *arguments)


def _new_key(path: Path) -> None:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)


def _authority() -> None:
    _new_key(PKI / "ca.key")
    _openssl(
        "req",
        "-x509",
        "-new",
        "-key",
        PKI / "ca.key",
        "-days",
        DAYS,
        "-subj",
        "/CN=finetune-cluster",
        "-out",
        PKI / "ca.crt",
    )


def _service_account_key() -> None:
    _new_key(PKI / "sa.key")
    _openssl("ec", "-in", PKI / "sa.key", "-pubout", "-out", PKI / "sa.pub")


def _issue(certificate: Certificate) -> None:
    key, request, extensions = (PKI / f"{certificate.name}{suffix}" for suffix in (".key", ".csr", ".ext"))
    _new_key(key)
    _openssl("req", "-new", "-key", key, "-subj", certificate.subject, "-out", request)
    hosts = ",".join(certificate.hosts) or f"DNS:{certificate.name}"
    extensions.write_text(f"extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName={hosts}\n")
    _openssl(
        "x509",
        "-req",
        "-in",
        request,
        "-CA",
        PKI / "ca.crt",
        "-CAkey",
        PKI / "ca.key",
        "-CAcreateserial",
        "-days",
        DAYS,
        "-extfile",
        extensions,
        "-out",
        PKI / f"{certificate.name}.crt",
    )
    request.unlink()
    extensions.unlink()


def _kubeconfig(user: str) -> str:
    def embedded(name: str) -> str:
        return base64.b64encode((PKI / name).read_bytes()).decode()

    cluster = {"server": API_SERVER, "certificate-authority-data": embedded("ca.crt")}
    credentials = {"client-certificate-data": embedded(f"{user}.crt"), "client-key-data": embedded(f"{user}.key")}
    return json.dumps(  # JSON is YAML
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "finetune", "cluster": cluster}],
            "users": [{"name": user, "user": credentials}],
            "contexts": [{"name": "finetune", "context": {"cluster": "finetune", "user": user}}],
            "current-context": "finetune",
        },
        indent=1,
    )


def _write_private(path: Path, text: str) -> None:
    fresh = path.with_suffix(path.suffix + ".new")
    fresh.touch(mode=0o600)
    fresh.write_text(text)
    os.replace(fresh, path)
