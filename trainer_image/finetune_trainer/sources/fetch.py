"""Files behind a URL: checked against their SHA-256, and never from an address that only the pod's own node may ask."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import socket
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import certifi
import urllib3

from finetune_trainer.failures import DATASET_NOT_FOUND, DOWNLOAD_FAILED, INVALID_DATASET, RunFailure
from finetune_trainer.storage.connection import full_disk

log = logging.getLogger(__name__)

MAX_REDIRECTS = 5
_ATTEMPTS = 4
_CHUNK = 1 << 20
# Cloud metadata services hand out the node's credentials; most are link-local, these are not.
_METADATA = {
    ipaddress.ip_address(address) for address in ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
}


def download(url: str, sha256: str, path: Path, field: str) -> None:
    """Download `url` to `path`; `field` names it in messages. Every redirect is checked like the URL itself."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            found = _get(url, path, field)
            break
        except urllib3.exceptions.HTTPError as error:
            if attempt == _ATTEMPTS:
                raise RunFailure(DOWNLOAD_FAILED, f"{field}: {url} cannot be downloaded ({error})") from error
            log.warning("dataset: %s broke off (%s); trying again", url, error)
    if found != sha256:
        raise RunFailure(
            INVALID_DATASET,
            f"{field}: the file behind {url} has SHA-256 {found}, {sha256} was asked for: it changed, or the value is "
            "wrong",
        )


def _get(url: str, path: Path, field: str) -> str:
    for _ in range(MAX_REDIRECTS + 1):
        host, address, port, secure = _target(url, field)
        pool: urllib3.HTTPConnectionPool
        timeout = urllib3.Timeout(connect=10, read=60)
        if secure:
            # the address that was checked is the one that is asked: a second look-up could answer differently
            pool = urllib3.HTTPSConnectionPool(
                address, port, timeout=timeout, server_hostname=host, assert_hostname=host,
                cert_reqs="CERT_REQUIRED", ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
            )  # fmt: skip
        else:
            pool = urllib3.HTTPConnectionPool(address, port, timeout=timeout)
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {
            "Host": parts.netloc.rpartition("@")[2],
            "User-Agent": "finetune-operator",
            "Accept-Encoding": "identity",
        }
        with (
            pool,
            pool.request(
                "GET", target, headers=headers, redirect=False, retries=False, preload_content=False
            ) as response,
        ):
            if location := response.get_redirect_location():
                url = urljoin(url, location)
                continue
            if response.status in (401, 403, 404, 410):
                raise RunFailure(
                    DATASET_NOT_FOUND,
                    f"{field}: {url} answered {response.status}: check the address and that it is public",
                )
            if response.status != 200:
                raise urllib3.exceptions.HTTPError(f"status {response.status}")
            sha = hashlib.sha256()
            with full_disk(path), open(path, "wb") as target_file:
                for chunk in response.stream(_CHUNK):
                    sha.update(chunk)
                    target_file.write(chunk)
            return sha.hexdigest()
    raise RunFailure(DOWNLOAD_FAILED, f"{field}: {url} redirects more than {MAX_REDIRECTS} times")


def _target(url: str, field: str) -> tuple[str, str, int, bool]:
    """(host name, checked address, port, whether TLS) of a URL."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise RunFailure(DATASET_NOT_FOUND, f"{field}: {url} is not an http:// or https:// address")
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)}
    except socket.gaierror as error:
        raise RunFailure(DOWNLOAD_FAILED, f"{field}: {parts.hostname} cannot be resolved ({error.strerror})") from error
    for address in sorted(found):
        if reason := refused(address):
            raise RunFailure(
                DATASET_NOT_FOUND,
                f"{field}: {url} leads to {address}, {reason}: data is fetched from public or cluster addresses only",
            )
    return parts.hostname, min(found, key=lambda address: (":" in address, address)), port, parts.scheme == "https"


def refused(address: str) -> str:
    """Why an address is never asked; empty when it may be."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if ip in _METADATA:
        return "a cloud metadata service"
    for reason, holds in (
        ("a loopback address", ip.is_loopback),
        ("a link-local address (cloud metadata services are there)", ip.is_link_local),
        ("an unspecified address", ip.is_unspecified),
        ("a multicast address", ip.is_multicast),
    ):
        if holds:
            return reason
    return ""
