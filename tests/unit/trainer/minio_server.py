"""A MinIO of its own for tests: the real server, which starts in a second."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCESS, SECRET = "finetune-test", "finetune-test-secret"


def minio_binary() -> str | None:
    """MinIO as `make` builds it for the embedded cluster, or one on PATH."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator/bin/minio"
    return str(cache) if cache.exists() else shutil.which("minio")


@contextmanager
def minio_server(folder: Path, bucket: str = "finetune", port: int = 0) -> Iterator[str]:
    """A running server with one bucket, empty at first; gives its endpoint, and sets the credentials in the
    environment. `port`: another than any that is free."""
    binary = minio_binary()
    assert binary
    port = port or _free_port()
    (folder / bucket).mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MINIO_ROOT_USER": ACCESS, "MINIO_ROOT_PASSWORD": SECRET, "MINIO_BROWSER": "off"}
    command = [binary, "server", "--quiet", "--address", f"127.0.0.1:{port}", str(folder)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(f"http://127.0.0.1:{port}/minio/health/ready")
        os.environ.update(AWS_ACCESS_KEY_ID=ACCESS, AWS_SECRET_ACCESS_KEY=SECRET)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"{url} did not answer")
