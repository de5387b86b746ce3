"""The bucket of the cluster under test, reached from this machine."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from minio import Minio

from e2e.cluster.layout import SYSTEM_NAMESPACE
from e2e.kubectl import Kubectl

SECRET = "finetune-storage"
SERVICE = "service/minio"
PORT = 9000


def credentials(kubectl: Kubectl, namespace: str = SYSTEM_NAMESPACE) -> dict[str, str]:
    secret = kubectl.get("secret", SECRET, "-n", namespace)
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


@contextmanager
def open_storage(kubectl: Kubectl) -> Iterator[Minio]:
    """A client of the cluster's MinIO, by a port forward that ends with the block."""
    with kubectl.port_forward(SYSTEM_NAMESPACE, SERVICE, PORT) as address:
        yield _client(kubectl, address)


def _client(kubectl: Kubectl, address: str) -> Minio:
    keys = credentials(kubectl)
    return Minio(
        endpoint=address,
        access_key=keys["AWS_ACCESS_KEY_ID"],
        secret_key=keys["AWS_SECRET_ACCESS_KEY"],
        secure=False,
        region="us-east-1",
    )


def address_in_cluster(kubectl: Kubectl, bucket: str, key: str) -> str:
    """A signed http:// address of the object for pods, good for an hour."""
    client = _client(kubectl, f"minio.{SYSTEM_NAMESPACE}:{PORT}")
    return str(client.presigned_get_object(bucket_name=bucket, object_name=key, expires=timedelta(hours=1)))


def upload_folder(client: Minio, folder: Path, bucket: str, prefix: str) -> int:
    """Make `bucket/prefix/` hold exactly the files of `folder`; returns how many had to be sent."""
    if not client.bucket_exists(bucket_name=bucket):
        client.make_bucket(bucket_name=bucket)
    # A small object's ETag is its MD5, so that what is there already need not be sent again.
    there = {
        entry.object_name: entry.etag
        for entry in client.list_objects(bucket_name=bucket, prefix=f"{prefix}/", recursive=True)
    }
    sent = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        key, content = f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes()
        if (there.pop(key, None) or "").strip('"') != hashlib.md5(content, usedforsecurity=False).hexdigest():
            put(client, bucket, key, content)
            sent += 1
    for key in there:
        client.remove_object(bucket_name=bucket, object_name=str(key))
    return sent


def put(client: Minio, bucket: str, key: str, content: bytes) -> None:
    # One part whatever the size: the ETag stays an MD5.
    client.put_object(
        bucket_name=bucket, object_name=key, data=io.BytesIO(content), length=len(content), part_size=5 * 2**30
    )
