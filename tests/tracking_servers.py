"""Fake tracking servers for tests: what our MLflow client and the real wandb library ask, answered from memory.

    python tests/tracking_servers.py mlflow|wandb [PORT]

prints after each answer what it has. Standard library only, one file: it also runs in a pod from a ConfigMap.
"""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message)
        self.status, self.body = status, {"error_code": code, "message": message}


@dataclass
class Fake:
    """`fail`: HTTP status of every answer, until it is None again."""

    url: str = ""
    fail: int | None = None
    authorizations: set[str | None] = field(default_factory=set)

    def answer(self, path: str, query: dict[str, str], body: Json) -> Json:
        raise NotImplementedError

    def has(self) -> Json:
        """What a test in another process is to know."""
        raise NotImplementedError


F = TypeVar("F", bound=Fake)


def server(fake: Fake, host: str = "127.0.0.1", port: int = 0, tell: bool = False) -> ThreadingHTTPServer:
    """Not yet serving; `tell`: print what the fake has after each answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                sent = gzip.decompress(sent)
            at = urlsplit(self.path)
            fake.url = f"http://{self.headers['Host']}"
            fake.authorizations.add(self.headers.get("Authorization"))
            try:
                if fake.fail:
                    raise Refusal(fake.fail, "UNAVAILABLE", "not now")
                query = {name: values[0] for name, values in parse_qs(at.query).items()}
                status, answer = 200, fake.answer(at.path, query, json.loads(sent) if sent[:1] == b"{" else {})
            except Refusal as refusal:
                status, answer = refusal.status, refusal.body
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            if tell:
                print(json.dumps(fake.has()), flush=True)

        do_POST = do_PUT = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """wandb-core drops its connections when it ends."""

    return Server((host, port), Handler)


@contextmanager
def served(fake: F) -> Iterator[F]:
    serving = server(fake)
    fake.url = f"http://127.0.0.1:{serving.server_port}"
    threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield fake
    finally:
        serving.shutdown()
        serving.server_close()


@dataclass
class FakeMLflow(Fake):
    """Experiments and runs; metrics are never overwritten, as there."""

    experiments: dict[str, str] = field(default_factory=dict)  # name: id
    runs: dict[str, Json] = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)  # every metric that was logged

    def answer(self, path: str, query: dict[str, str], body: Json) -> Json:
        call = path.removeprefix("/api/2.0/mlflow/")
        if call == "experiments/get-by-name":
            name = query["experiment_name"]
            if name not in self.experiments:
                raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"no experiment {name}")
            return {"experiment": {"experiment_id": self.experiments[name], "name": name, "lifecycle_stage": "active"}}
        if call == "experiments/create":
            self.experiments[body["name"]] = str(len(self.experiments) + 1)
            return {"experiment_id": self.experiments[body["name"]]}
        if call == "runs/search":
            wanted = body["filter"].partition(" = ")[2].strip("'")
            found = [run for run in self.runs.values() if wanted in (tag["value"] for tag in run["data"]["tags"])]
            return {"runs": [run for run in found if run["info"]["experiment_id"] in body["experiment_ids"]]}
        if call == "runs/create":
            return {"run": self._create(body)}
        if call == "runs/get":
            return {"run": self.runs[query["run_id"]]}
        if call == "metrics/get-history":
            return {"metrics": [one for one in self.history if one["key"] == query["metric_key"]]}
        return self._change(call, body)

    def has(self) -> Json:
        return {
            "runs": [
                {**run["info"], "tags": {tag["key"]: tag["value"] for tag in run["data"]["tags"]}}
                for run in self.runs.values()
            ],
            "steps": [one["step"] for one in self.history if one["key"] == "train/loss"],
        }

    def _create(self, body: Json) -> Json:
        run_id = f"{len(self.runs):032x}"
        info = {"run_id": run_id, "experiment_id": body["experiment_id"], "run_name": body["run_name"]}
        data: Json = {"metrics": [], "params": [], "tags": body["tags"]}
        self.runs[run_id] = {"info": info, "data": data}
        return self.runs[run_id]

    def _change(self, call: str, body: Json) -> Json:
        run = self.runs.get(body["run_id"])
        if run is None:
            raise Refusal(404, "RESOURCE_DOES_NOT_EXIST", f"no run {body['run_id']}")
        if call == "runs/update":
            run["info"] |= {name: body[name] for name in ("status", "end_time") if name in body}
        elif call == "runs/log-batch":
            params = {pair["key"]: pair["value"] for pair in run["data"]["params"]}
            for pair in body.get("params", []):
                if params.setdefault(pair["key"], pair["value"]) != pair["value"]:
                    raise Refusal(400, "INVALID_PARAMETER_VALUE", f"{pair['key']} was logged with another value")
            tags = {pair["key"]: pair["value"] for pair in [*run["data"]["tags"], *body.get("tags", [])]}
            newest = {one["key"]: one for one in [*run["data"]["metrics"], *body.get("metrics", [])]}
            run["data"] = {"params": _pairs(params), "tags": _pairs(tags), "metrics": list(newest.values())}
            self.history += body.get("metrics", [])
        else:
            raise Refusal(404, "ENDPOINT_NOT_FOUND", call)
        return {}


def _pairs(values: dict[str, str]) -> list[Json]:
    return [{"key": key, "value": value} for key, value in values.items()]


@dataclass
class FakeWandB(Fake):
    """One run: its config, and the lines of its history as wandb-core streams them."""

    config: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    summary: Json = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)

    def answer(self, path: str, query: dict[str, str], body: Json) -> Json:
        if path == "/graphql":
            return {"data": self._graphql(body.get("operationName", ""), body.get("variables", {}))}
        if path.endswith("/file_stream"):
            self._stream(body)
        return {}

    def has(self) -> Json:
        return {
            "steps": [line["_step"] for line in self.history],
            "exitCodes": self.exit_codes,
            "summary": self.summary,
        }

    def _graphql(self, operation: str, given: Json) -> Json:
        if operation == "RunResumeStatus":
            return {"model": self._resumed(given)} if self.config else {}
        if operation == "UpsertBucket":
            self.config = json.loads(given["config"] or "{}") or self.config
            self.names += [given["displayName"]] if given["displayName"] else []
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": given["entity"] or "acme"}}
            bucket = {"id": "b", "name": given["name"], "displayName": "", "project": project, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def _resumed(self, given: Json) -> Json:
        bucket = {
            "id": "b", "name": given["name"], "summaryMetrics": json.dumps(self.summary), "displayName": "",
            "logLineCount": 0, "historyLineCount": len(self.history), "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in self.history[-1:]]), "eventsTail": "[]",
            "config": json.dumps(self.config), "tags": [], "notes": "", "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "acme"}, "bucket": bucket}

    def _stream(self, body: Json) -> None:
        files = body.get("files", {})
        self.history += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary |= json.loads(line)
        if "exitcode" in body:
            self.exit_codes.append(body["exitcode"])


if __name__ == "__main__":
    kinds: dict[str, type[Fake]] = {"mlflow": FakeMLflow, "wandb": FakeWandB}
    server(kinds[sys.argv[1]](), "0.0.0.0", int(sys.argv[2]) if len(sys.argv) > 2 else 5000, tell=True).serve_forever()
