"""`make deploy`: the chart with these very images, storage credentials, and the demo's namespace."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, cast

from e2e.cluster import images, shell
from e2e.cluster.layout import DEMO_NAMESPACE, HERE, RELEASE, REPO, STATE, SYSTEM_NAMESPACE
from e2e.cluster.progress import Refused, step
from e2e.cluster.target import Target

Manifest = dict[str, Any]

CREDENTIALS_SECRET = "finetune-storage"
NAMESPACES = (SYSTEM_NAMESPACE, DEMO_NAMESPACE)
CHART = REPO / "charts" / "finetune-operator"
IMAGE_VALUES = STATE / "image-values.json"
ROLLOUT = 180


def deploy(cluster: Target) -> bool:
    """Install or upgrade the release; False when it is there, runs, and was made from these very files."""
    values = _value_files(cluster)
    fingerprint = _fingerprint(values)
    if _is_deployed(cluster, fingerprint):
        return False
    with step("namespaces and storage credentials"):
        credentials = _existing_credentials(cluster) or _new_credentials()
        holders = [_secret(namespace, credentials) for namespace in NAMESPACES]
        _apply(cluster, [*map(_namespace, NAMESPACES), *holders])
    log = STATE / "log" / "helm.log"
    with step(f"chart {RELEASE} into {SYSTEM_NAMESPACE}", log):
        install = cluster.helm("upgrade", "--install", RELEASE, str(CHART), "--namespace", SYSTEM_NAMESPACE)
        given = [f"--values={file}" for file in values]
        shell.logged([*install, *given, "--history-max", "3", "--description", fingerprint], log)
    for deployment in _deployments(cluster):
        name = deployment["metadata"]["name"]
        with step(f"rollout of {name}"):
            _wait_for(cluster, f"deployment/{name}")
    return True


def _value_files(cluster: Target) -> list[Path]:
    """The chart's values: what the kind of cluster needs, the images, and on a user's cluster the user's last word."""
    kind = HERE / ("values.yaml" if cluster.embedded else "values-existing.yaml")
    own = os.environ.get("VALUES") if not cluster.embedded else None
    return [kind, write_image_values(cluster), *([Path(own)] if own else [])]


def _fingerprint(values: list[Path]) -> str:
    """Hash of the chart and its values, kept as the release's description."""
    files = sorted(file for file in CHART.rglob("*") if file.is_file())
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (*files, *values)]
    return "made from " + hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]


def _is_deployed(cluster: Target, fingerprint: str) -> bool:
    status = shell.output(*cluster.helm("status", RELEASE, "-n", SYSTEM_NAMESPACE, "-o", "json"), check=False)
    info = json.loads(status)["info"] if status.strip() else {}
    if (info.get("status"), info.get("description")) != ("deployed", fingerprint):
        return False
    holders = cluster.kubectl("get", "secrets", "-A", "--field-selector", f"metadata.name={CREDENTIALS_SECRET}")
    found = shell.output(*holders, "-o", "jsonpath={.items[*].metadata.namespace}").split()
    deployments = _deployments(cluster)
    return set(NAMESPACES) <= set(found) and bool(deployments) and all(map(_is_rolled_out, deployments))


def _is_rolled_out(deployment: Manifest) -> bool:
    wanted, status = deployment["spec"]["replicas"], deployment["status"]
    seen = status.get("observedGeneration") == deployment["metadata"]["generation"]
    counts = (status.get("replicas"), status.get("updatedReplicas"), status.get("availableReplicas"))
    return seen and counts == (wanted, wanted, wanted)


def _wait_for(cluster: Target, deployment: str) -> None:
    """Wait for the new pods; when they do not come, say what the newest one says."""
    here = ("-n", SYSTEM_NAMESPACE)
    try:
        shell.output(*cluster.kubectl(*here, "rollout", "status", deployment, f"--timeout={ROLLOUT}s"))
    except Refused as failure:
        logs = shell.output(*cluster.kubectl(*here, "logs", deployment, "--tail=5", "--all-containers"), check=False)
        pods = shell.output(*cluster.kubectl(*here, "get", "pods"), check=False)
        raise Refused(f"{failure}\n{pods}{logs}{deployment} did not become available in {ROLLOUT}s") from None


def image_values(cluster: Target) -> dict[str, Any]:
    """The chart's values that name our images by their content."""

    def full(image: images.Image) -> dict[str, str]:
        return {"repository": f"{cluster.pull_from}/{image.name}", "tag": image.tag}

    own = {image.name: {"repository": image.name, "tag": image.tag} for image in images.OWN}
    values: dict[str, Any] = {"images": {"registry": cluster.pull_from, **own}}
    if cluster.embedded:  # elsewhere the official images of vLLM and MinIO can be pulled, and there are GPUs
        values["images"]["engine"] = full(images.ENGINE)
        values["minio"] = {"image": full(images.MINIO)}
    return values


def write_image_values(cluster: Target) -> Path:
    IMAGE_VALUES.parent.mkdir(exist_ok=True)
    IMAGE_VALUES.write_text(json.dumps(image_values(cluster), indent=1))
    return IMAGE_VALUES


def _deployments(cluster: Target) -> list[Manifest]:
    get = cluster.kubectl("-n", SYSTEM_NAMESPACE, "get", "deployments", "-l", f"app.kubernetes.io/instance={RELEASE}")
    return cast(list[Manifest], json.loads(shell.output(*get, "-o", "json"))["items"])


def _namespace(name: str) -> Manifest:
    # Nothing of ours needs more than the strictest profile, and here that is enforced.
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def _secret(namespace: str, credentials: dict[str, str]) -> Manifest:
    metadata = {"name": CREDENTIALS_SECRET, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": credentials}


def _existing_credentials(cluster: Target) -> dict[str, str] | None:
    get = cluster.kubectl(
        "-n", SYSTEM_NAMESPACE, "get", "secret", CREDENTIALS_SECRET, "--ignore-not-found", "-o", "json"
    )
    text = shell.output(*get)
    return json.loads(text)["data"] if text.strip() else None


def _new_credentials() -> dict[str, str]:
    plain = {"AWS_ACCESS_KEY_ID": "finetune", "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(24)}
    return {key: base64.b64encode(value.encode()).decode() for key, value in plain.items()}


def _apply(cluster: Target, manifests: list[Manifest]) -> None:
    listed = {"apiVersion": "v1", "kind": "List", "items": manifests}
    shell.output(*cluster.kubectl("apply", "-f", "-"), stdin=json.dumps(listed))
