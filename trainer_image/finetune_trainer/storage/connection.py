"""The connection to an S3 server: credentials from the environment, waiting out an outage, and errors as failures."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from finetune_trainer import failures
from finetune_trainer.failures import RunFailure

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

AWS = "https://s3.amazonaws.com"
CONNECTIONS = 16
_NOT_FOUND = {"NoSuchKey", "NoSuchBucket", "NoSuchObject"}
_UNAUTHORIZED = {
    "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidTokenId", "InvalidToken",
    "AuthorizationHeaderMalformed", "AccountProblem", "AllAccessDisabled",
}  # fmt: skip
_SKEWED = "RequestTimeTooSkewed"
_PASSING = {"SlowDown", "RequestTimeout", _SKEWED, "XMinioServerNotInitialized"}


class ObjectNotFound(Exception):
    """There is no such object or bucket; callers turn it into the failure that fits what they were looking for."""


def connect(endpoint: str, region: str) -> Minio:
    """A client with the credentials of the environment; it never retries by itself, `Patience` does, with log lines."""
    parts = urlsplit(endpoint or AWS)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise RunFailure(failures.STORAGE_UNAVAILABLE, f"storage endpoint {endpoint!r} is not http(s)://host:port")
    access, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if bool(access) != bool(secret):
        raise RunFailure(
            failures.STORAGE_UNAUTHORIZED,
            "the storage Secret needs both keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    pool = urllib3.PoolManager(
        maxsize=CONNECTIONS,
        timeout=urllib3.Timeout(connect=5, read=30),
        retries=urllib3.Retry(total=0, redirect=3, raise_on_status=False),
        cert_reqs="CERT_REQUIRED",
        ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
    )
    return Minio(
        parts.netloc,
        access_key=access,
        secret_key=secret,
        session_token=os.environ.get("AWS_SESSION_TOKEN") or None,
        secure=parts.scheme == "https",
        region=region or "us-east-1",  # unset, the client would ask the server first
        http_client=pool,
    )


class Patience:
    """Runs operations; waits visibly and for a bounded time while the server cannot be reached."""

    def __init__(
        self,
        endpoint: str,
        wait_seconds: float,
        secret_name: str,
        stop: threading.Event,
        told: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`secret_name`: of the credentials, for messages. `stop`: set it to give up waiting at once. `told`: is told
        what is waited for, again with every try, and an empty text when nothing is any more.
        """
        self.endpoint, self._wait, self._secret, self._stop = endpoint, wait_seconds, secret_name, stop
        self._told, self._waiting, self._lock = told, list[object](), threading.Lock()

    def run(self, what: str, bucket: str, operation: Callable[[], Answer]) -> Answer:
        """The operation's answer. Raises ObjectNotFound, or RunFailure when waiting does not help."""
        waiter = object()
        try:
            return self._until_answered(waiter, what, bucket, operation)
        finally:
            self._goes_on(waiter)

    def _until_answered(self, waiter: object, what: str, bucket: str, operation: Callable[[], Answer]) -> Answer:
        deadline, delay = math.inf, 1.0
        while True:
            try:
                return operation()
            except S3Error as error:
                trouble = self._classify(what, bucket, error)
            except (ServerError, InvalidResponseError) as error:
                trouble = str(error)
            except urllib3.exceptions.HTTPError as error:
                trouble = self._connection_trouble(what, error)
            except MinioException as error:
                raise RunFailure(failures.STORAGE_UNAVAILABLE, f"{what}: {error}") from error
            # From the first trouble on: a large file may have been on its way for minutes before.
            deadline = min(deadline, time.monotonic() + self._wait)
            left = deadline - time.monotonic()
            if left <= 0 or self._stop.is_set():
                check = "set this node's clock" if _SKEWED in trouble else "check the storage endpoint and that it runs"
                raise RunFailure(
                    failures.STORAGE_UNAVAILABLE,
                    f"{what}: {self.endpoint} did not answer for {self._wait:.0f} s ({trouble}); {check}",
                )
            self._waits(waiter, f"{what}: {self.endpoint} does not answer ({trouble})", left)
            self._stop.wait(min(delay, left))
            delay = min(delay * 2, 10.0)

    def _waits(self, waiter: object, text: str, left: float) -> None:
        """Of several files that wait for the same server the first one speaks."""
        with self._lock:
            if waiter not in self._waiting:
                self._waiting.append(waiter)
            if self._waiting[0] is waiter:
                log.warning("storage: %s; trying again for %.0f s more", text, left)
                self._told(text)

    def _goes_on(self, waiter: object) -> None:
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                if not self._waiting:
                    self._told("")

    def _classify(self, what: str, bucket: str, error: S3Error) -> str:
        """Raise what waiting cannot cure; otherwise say what the trouble is."""
        code = error.code or ""
        if code in _NOT_FOUND:
            raise ObjectNotFound(f"{what}: {error.message}") from error
        if code in _UNAUTHORIZED:
            secret = f"Secret {self._secret!r}" if self._secret else "the storage credentials' Secret"
            may = f" and that they may use bucket {bucket!r}" if code == "AccessDenied" else ""
            raise RunFailure(
                failures.STORAGE_UNAUTHORIZED,
                f"{what}: {self.endpoint} answered {code}; "
                f"check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in {secret}{may}",
            ) from error
        status = getattr(error.response, "status", 0)
        if status >= 500 or status == 429 or code in _PASSING:
            return f"{code}: {error.message}"
        raise RunFailure(
            failures.STORAGE_UNAVAILABLE, f"{what}: {self.endpoint} answered {code}: {error.message}"
        ) from error

    def _connection_trouble(self, what: str, error: urllib3.exceptions.HTTPError) -> str:
        cause = getattr(error, "reason", None) or error
        if isinstance(cause, urllib3.exceptions.SSLError):
            raise RunFailure(
                failures.STORAGE_UNAVAILABLE,
                f"{what}: TLS with {self.endpoint} failed ({cause}); check the endpoint's scheme and CA certificate",
            ) from error
        return str(cause).rpartition(": ")[2] or type(cause).__name__


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into its own failure."""
    try:
        yield
    except Exception as error:
        if failures.out_of_space(error):
            raise RunFailure(
                failures.DISK_FULL, f"no space left for {path}; raise the pod's ephemeral storage or use less data"
            ) from error
        raise
