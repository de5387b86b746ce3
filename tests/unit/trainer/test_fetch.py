"""Files behind URLs: checked by their hash, redirects followed, and the node's own addresses never asked."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune_trainer.failures import RunFailure
from finetune_trainer.sources import fetch
from finetune_trainer.sources.fetch import download, refused

CONTENT = b'{"text": "one"}\n' * 100_000
SHA = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    broken = 0

    def do_GET(self) -> None:
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/once-broken" and not Handler.broken:
            Handler.broken += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:1000])
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server on this machine; loopback is allowed for the test, everything else stays refused."""
    monkeypatch.setattr(fetch, "refused", lambda address: "" if address == "127.0.0.1" else refused(address))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/train.jsonl?version=2", "/to?/train.jsonl", "/once-broken"])
def test_a_file_is_downloaded_and_checked(url: str, path: str, tmp_path: Path) -> None:
    download(url + path, SHA, tmp_path / "file", "dataset.train.http.url")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_file_with_another_hash_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailure, match=f"has SHA-256 {SHA}, {'0' * 64} was asked for") as caught:
        download(f"{url}/x", "0" * 64, tmp_path / "file", "dataset.train.http.url")
    assert caught.value.reason == "InvalidDataset"  # a user's error: trying again does not help


def test_a_missing_file_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailure, match=r"dataset.train.http.url: .*/missing answered 404") as caught:
        download(f"{url}/missing", SHA, tmp_path / "file", "dataset.train.http.url")
    assert caught.value.reason == "DatasetNotFound"


@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/latest/meta-data", "http://[::1]/", "http://100.100.100.200/", "ftp://example.org/x"],
)
def test_a_redirect_to_a_forbidden_address_is_refused(url: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailure, match="leads to|is not an http"):
        download(f"{url}/to?{target}", SHA, tmp_path / "file", "dataset.train.http.url")


def test_redirects_end(url: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailure, match="redirects more than 5 times"):
        download(f"{url}/to?{'/to?' * 9}/x", SHA, tmp_path / "file", "dataset.train.http.url")


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1", "a loopback address"),
        ("127.8.8.8", "a loopback address"),
        ("::1", "a loopback address"),
        ("::ffff:127.0.0.1", "a loopback address"),
        ("169.254.169.254", "a link-local address (cloud metadata services are there)"),
        ("fe80::1%eth0", "a link-local address (cloud metadata services are there)"),
        ("fd00:ec2::254", "a cloud metadata service"),
        ("0.0.0.0", "an unspecified address"),
        ("224.0.0.1", "a multicast address"),
        ("10.96.0.10", ""),
        ("192.168.1.2", ""),
        ("93.184.216.34", ""),
    ],
)
def test_only_public_and_cluster_addresses_are_asked(address: str, why: str) -> None:
    assert refused(address) == why


def test_a_name_that_leads_to_a_forbidden_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RunFailure, match="leads to .*, a loopback address: data is fetched from public or cluster addresses only"
    ):
        download("http://localhost:1/x", SHA, tmp_path / "file", "dataset.train.http.url")
