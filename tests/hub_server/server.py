"""A fake Hugging Face hub for tests: serves a folder with enough of the hub's HTTP API for the real client libraries.

    python tests/hub_server/server.py --root FOLDER [--host 0.0.0.0] [--port 8088]
    HF_ENDPOINT=http://127.0.0.1:8088 python -c 'import huggingface_hub as h; print(h.snapshot_download("acme/tiny"))'

The folder is laid out as the hub's addresses are, and read anew for each request:

    models/acme/tiny/config.json            revision "main" of model acme/tiny
    models/acme/tiny@v1/config.json         its tag or branch "v1"
    datasets/acme/facts/train.jsonl         dataset acme/facts
    hub.json                                optional: {"tokens": {"hf_member": ["acme/gated"], "hf_stranger": []},
                                                       "gated": ["acme/gated"], "private": ["acme/secret"],
                                                       "writers": {"hf_member": ["acme"]}}

A token of `writers` may create repositories of these owners and commit to them, LFS over HTTP included.

A commit id is the hash of the tree, so it changes when a file does. Tokens that hub.json does not know are refused.
Standard library only, one file: it also runs in a pod from a ConfigMap.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"^/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?|/(refs))?$")
RESOLVE = re.compile(r"^/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
PREUPLOAD = re.compile(r"^/api/models/([^/]+/[^/]+)/preupload/main$")
COMMIT = re.compile(r"^/api/models/([^/]+/[^/]+)/commit/main$")
LFS_BATCH = re.compile(r"^/([^/]+/[^/]+)\.git/info/lfs/objects/batch$")
LFS_OBJECT = re.compile(r"^/lfs/([0-9a-f]{64})$")
# What git would keep in LFS: the hub then answers with the SHA-256 as ETag, and with the git blob's id otherwise.
LFS_SUFFIXES = {".safetensors", ".bin", ".parquet", ".gz", ".arrow", ".zst"}


class HubError(Exception):
    """An answer that is not 200; `code` is the hub's X-Error-Code, which the client turns into an exception class."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit

    @property
    def headers(self) -> dict[str, str]:
        named = {"X-Error-Message": self.message, "X-Error-Code": self.code, "X-Repo-Commit": self.commit}
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True)
class Blob:
    path: str
    file: Path
    size: int
    sha256: str
    git_id: str

    @property
    def is_lfs(self) -> bool:
        return self.file.suffix in LFS_SUFFIXES

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id

    def as_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": self.path, "size": self.size, "oid": self.git_id}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Tree:
    """One revision of one repository."""

    ref: str
    sha: str
    blobs: tuple[Blob, ...]

    def entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = folder.rstrip("/") + "/" if folder else ""
        inside = [blob for blob in self.blobs if blob.path.startswith(prefix)]
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {self.ref!r}", "EntryNotFound")
        parents = {str(parent) for blob in inside for parent in PurePosixPath(blob.path).parents} - {"."}
        listed: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "size": 0, "oid": _sha1(path.encode())} for path in sorted(parents)
        ]
        listed += [blob.as_json() for blob in inside]
        own = [entry for entry in listed if entry["path"].startswith(prefix)]
        return own if recursive else [entry for entry in own if "/" not in entry["path"][len(prefix) :]]

    def named(self, paths: list[str]) -> list[dict[str, Any]]:
        return [entry for entry in self.entries("", recursive=True) if entry["path"] in paths]


@dataclass(frozen=True)
class Access:
    """hub.json: who may read what."""

    tokens: dict[str, list[str]]
    gated: frozenset[str]
    private: frozenset[str]
    writers: dict[str, list[str]]

    @classmethod
    def read(cls, root: Path) -> Access:
        file = root / "hub.json"
        raw = json.loads(file.read_text()) if file.exists() else {}
        return cls(
            raw.get("tokens", {}),
            frozenset(raw.get("gated", [])),
            frozenset(raw.get("private", [])),
            raw.get("writers", {}),
        )

    def check_token(self, token: str | None) -> None:
        if token is not None and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")

    def check_writable(self, repo: str, token: str | None) -> None:
        if token is None:
            raise HubError(401, "Invalid username or password.")
        owner = repo.split("/")[0]
        if owner not in self.writers.get(token, []):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')

    def check_visible(self, repo: str, token: str | None) -> None:
        if repo in self.private and repo not in self.tokens.get(token or "", []):
            raise repository_not_found(token)

    def check_readable(self, repo: str, token: str | None) -> None:
        """Metadata of a gated repository is public; its files are not."""
        if repo not in self.gated or repo in self.tokens.get(token or "", []):
            return
        if token is None:
            raise HubError(
                401, f"Access to model {repo} is restricted. You must be authenticated to access it.", "GatedRepo"
            )
        raise HubError(
            403, f"Access to model {repo} is restricted and you are not in the authorized list.", "GatedRepo"
        )


def repository_not_found(token: str | None) -> HubError:
    # Without a token the hub does not say whether a repository is missing or private: both are 401.
    return HubError(404 if token else 401, "Repository not found", "RepoNotFound")


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def read_tree(folder: Path, ref: str) -> Tree:
    blobs = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        git_id = _sha1(b"blob %d\0" % len(content) + content)
        path = file.relative_to(folder).as_posix()
        blobs.append(Blob(path, file, len(content), hashlib.sha256(content).hexdigest(), git_id))
    sha = _sha1("\n".join(f"{blob.path} {blob.sha256}" for blob in blobs).encode())
    return Tree(ref, sha, tuple(blobs))


def find_revisions(root: Path, kind: str, repo: str, token: str | None) -> list[Tree]:
    owner, name = repo.split("/")
    parent = root / kind / owner
    if not (parent / name).is_dir() or ".." in (owner, name):
        raise repository_not_found(token)
    tagged = [path for path in sorted(parent.glob(f"{name}@*")) if path.is_dir()]
    return [read_tree(parent / name, "main")] + [read_tree(path, path.name.split("@", 1)[1]) for path in tagged]


def find_tree(trees: list[Tree], revision: str) -> Tree:
    for tree in trees:
        if revision == tree.ref or (len(revision) >= 7 and tree.sha.startswith(revision)):
            return tree
    raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Handler(BaseHTTPRequestHandler):
    """What reads, and for models what creates and commits; everything else is 404 as on the hub."""

    root: ClassVar[Path]
    protocol_version = "HTTP/1.1"
    server_version = "fake-hub"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        self._answer(body=True)

    def do_PUT(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        print(f"{self.log_date_time_string()} {format % args}", flush=True)

    def _answer(self, body: bool) -> None:
        # Read first: a body left in the socket would be taken for the next request.
        form = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._route(body, form)
        except HubError as error:
            self._send_json(error.status, {"error": error.message}, error.headers, body)

    def _route(self, body: bool, form: bytes) -> None:
        url = urlsplit(self.path)
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ").strip() if authorization else None
        access = Access.read(self.root)
        access.check_token(token)
        if url.path == "/api/whoami-v2":
            if token is None:
                raise HubError(401, "Invalid username or password.")
            return self._send_json(
                200, {"type": "user", "name": token, "auth": {"accessToken": {"role": "read"}}}, {}, body
            )
        if self.command in ("POST", "PUT") and self._write(url.path, form, access, token):
            return None
        if match := API.match(url.path):
            kind, repo, action, revision, rest, refs = match.groups()
            access.check_visible(repo, token)
            trees = find_revisions(self.root, kind, repo, token)
            if refs:
                return self._send_json(200, self._refs(trees), {}, body)
            tree = find_tree(trees, unquote(revision or "main"))
            if action == "tree":
                recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
                return self._send_json(200, tree.entries(unquote(rest or ""), recursive), {}, body)
            if action == "paths-info":
                return self._send_json(200, tree.named(_paths(form, self.headers.get("Content-Type", ""))), {}, body)
            return self._send_json(200, self._info(repo, tree, access), {}, body)
        if match := RESOLVE.match(url.path):
            dataset, repo, revision, path = match.groups()
            access.check_visible(repo, token)
            tree = find_tree(
                find_revisions(self.root, "datasets" if dataset else "models", repo, token), unquote(revision)
            )
            access.check_readable(repo, token)
            blob = next((blob for blob in tree.blobs if blob.path == unquote(path)), None)
            if blob is None:
                # The client remembers "this commit has no such file", so the commit is named even here.
                raise HubError(404, f"Entry not found: {path}", "EntryNotFound", commit=tree.sha)
            return self._send_file(blob, tree, body)
        raise HubError(404, f"Sorry, {url.path} is not an address of the fake hub.")

    def _write(self, path: str, form: bytes, access: Access, token: str | None) -> bool:
        """Answer a request that creates or changes something; False when it is none."""
        if path == "/api/validate-yaml":
            self._send_json(200, {"errors": [], "warnings": []}, {}, body=True)
        elif path == "/api/repos/create":
            asked = json.loads(form)
            repo = f"{asked['organization']}/{asked['name']}"
            access.check_writable(repo, token)
            folder = self.root / "models" / repo
            existed = folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            if not existed and (asked.get("private") or asked.get("visibility") == "private"):
                self._make_private(repo, str(token))
            answer = {"url": f"{self._base()}/{repo}", "id": repo, "name": repo}
            if existed:
                answer["error"] = "You already created this model repo"
            self._send_json(409 if existed else 200, answer, {}, body=True)
        elif match := PREUPLOAD.match(path):
            access.check_writable(match[1], token)
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if PurePosixPath(file["path"]).suffix in LFS_SUFFIXES else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(form)["files"]
            ]
            self._send_json(200, {"files": modes}, {}, body=True)
        elif match := LFS_BATCH.match(path):
            access.check_writable(match[1], token)
            objects = [
                {**one, "actions": {"upload": {"href": f"{self._base()}/lfs/{one['oid']}"}}}
                for one in json.loads(form)["objects"]
            ]
            self._send_json(200, {"transfer": "basic", "objects": objects}, {}, body=True)
        elif match := LFS_OBJECT.match(path):
            if hashlib.sha256(form).hexdigest() != match[1]:
                raise HubError(400, "The content is not that of the oid")
            stored = self.root / "lfs" / match[1]
            stored.parent.mkdir(exist_ok=True)
            stored.write_bytes(form)
            self._send_json(200, {}, {}, body=True)
        elif match := COMMIT.match(path):
            access.check_writable(match[1], token)
            self._commit(match[1], [json.loads(line) for line in form.splitlines()])
        else:
            return False
        return True

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        folder = self.root / "models" / repo
        for line in lines:
            value = line["value"]
            if line["key"] not in ("file", "lfsFile", "deletedFile"):
                continue
            target = folder / value["path"]
            if not target.resolve().is_relative_to(folder.resolve()):
                raise HubError(400, f"{value['path']} is no path in a repository")
            if line["key"] == "deletedFile":
                target.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                target.write_bytes(base64.b64decode(value["content"]))
            else:
                target.write_bytes((self.root / "lfs" / value["oid"]).read_bytes())
        sha = read_tree(folder, "main").sha
        url = f"{self._base()}/{repo}/commit/{sha}"
        self._send_json(200, {"success": True, "commitOid": sha, "commitUrl": url}, {}, body=True)

    def _make_private(self, repo: str, token: str) -> None:
        file = self.root / "hub.json"
        settings = json.loads(file.read_text())
        settings.setdefault("private", []).append(repo)
        settings["tokens"][token] = [*settings["tokens"].get(token, []), repo]
        file.write_text(json.dumps(settings))

    def _base(self) -> str:
        return f"http://{self.headers['Host']}"

    def _info(self, repo: str, tree: Tree, access: Access) -> dict[str, Any]:
        return {
            "_id": _sha1(repo.encode())[:24],
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": tree.sha,
            "private": repo in access.private,
            "gated": "auto" if repo in access.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": blob.path} for blob in tree.blobs],
        }

    def _refs(self, trees: list[Tree]) -> dict[str, Any]:
        named = [{"name": tree.ref, "ref": f"refs/heads/{tree.ref}", "targetCommit": tree.sha} for tree in trees]
        return {"branches": named, "tags": [], "converts": []}

    def _send_file(self, blob: Blob, tree: Tree, body: bool) -> None:
        content, status = blob.file.read_bytes(), 200
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{blob.etag}"',
            "X-Repo-Commit": tree.sha,
            "Accept-Ranges": "bytes",
        }
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        if wanted := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or blob.size - 1), blob.size - 1)
            if first >= blob.size:
                return self._send(416, b"", {"Content-Range": f"bytes */{blob.size}"}, body)
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
        self._send(status, content, headers, body)

    def _send_json(self, status: int, answer: Any, headers: dict[str, str], body: bool) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **headers}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _paths(form: bytes, content_type: str) -> list[str]:
    if "json" in content_type:
        return list(json.loads(form)["paths"])
    return parse_qs(form.decode()).get("paths", [])


class HubServer:
    """`with HubServer(root) as hub: ... hub.url` serves `root` on a free port of this machine."""

    def __init__(self, root: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = ThreadingHTTPServer((host, port), type("RootedHandler", (Handler,), {"root": root}))
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve_forever(self) -> None:
        self._server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder to serve")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8088)
    options = parser.parse_args()
    server = HubServer(options.root, options.host, options.port)
    print(f"fake hub: {options.root} at {server.url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
