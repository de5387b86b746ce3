"""ASGI middleware inside vLLM's API server: stable adapter names in, digest names through, admin endpoints closed.

    python -m vllm.entrypoints.openai.api_server --middleware finetune_serving.middleware.AdapterMiddleware ...

A swap, canary or rollback of an adapter is a new mapping file (`routes.py`): nothing is loaded twice and no request
fails. The answer's `model` is the engine's own name, `support-bot@3f9a1c20b7de`, so it says which digest answered.
What a canary fails to answer is counted, and answered by the adapter beside it.
Standard library only, Python 3.10 and later: it runs in an image that we did not build.
"""

from __future__ import annotations

import hmac
import json
import os
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

from finetune_serving import slots
from finetune_serving.routes import Aliases, AliasFile
from finetune_serving.trial import Answer

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
#: An engine name, and the request that asks for it.
Asked = tuple[str, bytes]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Larger requests are refused before they are read; base64 images are the largest thing that clients send.
MAX_BODY = 64 * 1024 * 1024
TOKEN_HEADER = b"x-finetune-token"

# Everything that is not listed needs the agent's token. vLLM 0.32 has some forty administrative endpoints (LoRA
# loading, SageMaker's /adapters, weight updates, sleep, RPC) that it opens to every client; a list of those to close
# would be out of date with its next release.
PUBLIC_PREFIXES = ("/v1/", "/v2/", "/static/", "/metrics/")
PUBLIC_PATHS = frozenset(
    [
        "/",
        "/health",
        "/ping",
        "/metrics",
        "/version",
        "/load",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/tokenize",
        "/detokenize",
        "/pooling",
        "/classify",
        "/score",
        "/rerank",
        "/generative_scoring",
        "/finetune/ready",
    ]
)
CLOSED_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
RETRY_AFTER_SECONDS = 5

# vLLM 0.32 on a CPU: with LoRA, one such request beside any other ends the engine for everybody ("einsum(): subscript
# b has size ..." in punica_cpu.add_lora_logits). The operator sets the variable for pods without a GPU.
NO_PROMPT_LOGPROBS = (
    "prompt_logprobs (and echo with logprobs) are refused: vLLM on a CPU crashes on them while adapters are mounted. "
    "Serve with a GPU or with mode: Merge."
)


class AdapterMiddleware:
    """One instance per API server process; its boot id tells the agent that the engine was restarted."""

    def __init__(self, app: App, state: str | None = None) -> None:
        state_dir = Path(state or os.environ.get("FINETUNE_STATE_DIR", "/finetune"))
        self._app = app
        self._boot = uuid.uuid4().hex
        self._aliases = AliasFile(state_dir / "aliases.json")
        self._token_file = state_dir / "token"
        self._in_flight: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._refuses_prompt_logprobs = os.environ.get("FINETUNE_REFUSE_PROMPT_LOGPROBS") == "true"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not is_public(route_path(scope)):
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = route_path(scope), scope["method"]
        trusted = self._has_token(scope)
        if not trusted and not is_public(path):
            message = f"{path} is closed: adapters are loaded by the AdapterDeployment's agent, not by clients."
            await refuse(send, 403, "PermissionDenied", message)
        elif path == "/finetune/engine":
            state = {"boot": self._boot, "inFlight": dict(self._in_flight), "failed": dict(self._failed)}
            await answer(send, 200, state)
        elif path == "/finetune/ready":
            await self._ready(scope, receive, send)
        elif path == "/v1/unload_lora_adapter" and method == "POST":
            await self._unload(with_api_key(scope), receive, send)
        elif path == "/v1/models" and method == "GET":
            await self._models(scope, receive, send)
        elif method == "POST" and is_json(scope):
            await self._request(with_api_key(scope) if trusted else scope, receive, send, trusted)
        else:
            await self._app(with_api_key(scope) if trusted else scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        given = header(scope, TOKEN_HEADER)
        if not given:
            return False
        try:
            expected = self._token_file.read_bytes().strip()
        except FileNotFoundError:
            return False
        return bool(expected) and hmac.compare_digest(given, expected)

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 only when every desired name has an adapter that was verified in this very process."""
        aliases = self._aliases.read()
        if aliases.boot != self._boot:
            await answer(send, 503, {"ready": False, "message": "adapters are not loaded in this engine process yet"})
        elif not aliases.ready:
            await answer(send, 503, {"ready": False, "message": aliases.message})
        else:
            # The engine's core can be dead while its API server still answers; its own check knows.
            await self._app({**scope, "path": "/health", "raw_path": b"/health"}, receive, send)

    async def _unload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Only the agent gets here. The adapter's slot is freed before it hears that the adapter is gone."""
        body = await read_body(scope, receive)
        name = str((parse(body) or {}).get("lora_name", ""))
        number = slots.adapter_id(scope.get("app"), name)

        async def freed(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200 and number is not None:
                await slots.free(scope.get("app"), number)
            await send(message)

        await self._app(scope, replay(body, receive), freed)

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lists the stable names before the engine's: clients take the first one for the default."""
        aliases = self._current()
        collected = bytearray()
        start: Message = {}

        async def collect(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            collected.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            body = with_stable_names(bytes(collected), aliases) if start["status"] == 200 else bytes(collected)
            await send({**start, "headers": with_length(start["headers"], len(body))})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, collect)

    async def _request(self, scope: Scope, receive: Receive, send: Send, trusted: bool) -> None:
        try:
            body = await read_body(scope, receive)
        except BodyTooLarge:
            await refuse(send, 413, "RequestTooLarge", f"The request body is larger than {MAX_BODY >> 20} MiB.")
            return
        except ClientGone:
            return
        request = parse(body)
        if request is not None and self._refuses_prompt_logprobs and asks_for_prompt_logprobs(request):
            await refuse(send, 400, "BadRequestError", NO_PROMPT_LOGPROBS)
            return
        model = request.get("model") if request is not None else None
        if request is None or not isinstance(model, str):
            await self._app(with_body(scope, body), replay(body, receive), send)
            return
        aliases, asked, stable = self._current(), (model, body), None
        if model in aliases.names:
            chosen = aliases.choose(model, random.random())
            if chosen is None:
                message = f"The model {model!r} is being loaded; try again in {RETRY_AFTER_SECONDS} seconds."
                await refuse(send, 503, "ServiceUnavailable", message)
                return
            asked, stable = asking(request, chosen), aliases.stable(model)
        trial = aliases.trial_of(asked[0])
        if trial and not trusted:  # the agent's own questions are no client's
            await self._tried(trial, asked, asking(request, stable) if stable else None, scope, receive, send)
        else:
            await self._counted(asked, scope, receive, send)

    async def _tried(
        self, trial: str, asked: Asked, stable: Asked | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """A canary's failure ends its trial; the adapter beside it answers, unless the client asked for the digest."""
        passed_on = Answer(send, replaceable=stable is not None)
        try:
            await self._counted(asked, scope, receive, passed_on.send)
        except Exception:
            passed_on.failed = True
            if not passed_on.kept_back:
                raise
        finally:
            if passed_on.failed:
                self._failed[trial] += 1
        if stable is not None and passed_on.kept_back:
            await self._counted(stable, scope, receive, send)

    async def _counted(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        """The agent unloads an adapter only when no request that was sent to it is still being answered."""
        model, body = asked
        self._in_flight[model] += 1
        try:
            await self._app(with_body(scope, body), replay(body, receive), send)
        finally:
            self._in_flight[model] -= 1
            if self._in_flight[model] <= 0:
                del self._in_flight[model]

    def _current(self) -> Aliases:
        """The mapping, without its routes when they were verified in an engine process that is gone."""
        aliases = self._aliases.read()
        return aliases if aliases.boot == self._boot else Aliases(names=aliases.names)


def route_path(scope: Scope) -> str:
    """The path as the router will see it: without `--root-path`."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def is_public(path: str) -> bool:
    # A trailing slash is redirected by the router, so it must not open what is closed.
    if (path.rstrip("/") or "/") in CLOSED_PATHS:
        return False
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES)


def header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key.lower() == name), None)


def is_json(scope: Scope) -> bool:
    if header(scope, b"content-encoding"):
        return False
    kind = (header(scope, b"content-type") or b"").split(b";")[0].strip().lower()
    return kind == b"application/json" or kind.endswith(b"+json")


def with_api_key(scope: Scope) -> Scope:
    """The agent's own token also opens an engine that asks clients for `VLLM_API_KEY`."""
    key = os.environ.get("VLLM_API_KEY")
    if not key or header(scope, b"authorization"):
        return scope
    return {**scope, "headers": [*scope["headers"], (b"authorization", b"Bearer " + key.encode())]}


def with_length(headers: Iterable[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    # A chunked request arrives whole at the engine, so its transfer encoding goes too.
    dropped = (b"content-length", b"transfer-encoding")
    kept = [(key, value) for key, value in headers if key.lower() not in dropped]
    return [*kept, (b"content-length", str(length).encode())]


def with_body(scope: Scope, body: bytes) -> Scope:
    return {**scope, "headers": with_length(scope["headers"], len(body))}


def asking(request: dict[str, Any], model: str) -> Asked:
    """The same request, of this engine name."""
    return model, json.dumps({**request, "model": model}).encode()


class BodyTooLarge(Exception):
    """More than MAX_BODY bytes were announced or sent."""


class ClientGone(Exception):
    """The client left before it had sent everything."""


async def read_body(scope: Scope, receive: Receive) -> bytes:
    announced = header(scope, b"content-length") or b"0"
    if announced.isdigit() and int(announced) > MAX_BODY:
        raise BodyTooLarge
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body.extend(message.get("body", b""))
        if len(body) > MAX_BODY:
            raise BodyTooLarge
        if not message.get("more_body"):
            return bytes(body)


def parse(body: bytes) -> dict[str, Any] | None:
    """None for anything but a JSON object; the engine words the error for it."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def asks_for_prompt_logprobs(request: dict[str, Any]) -> bool:
    return request.get("prompt_logprobs") is not None or bool(request.get("echo") and request.get("logprobs"))


def replay(body: bytes, receive: Receive) -> Receive:
    """Hands the read body to the engine once; after it come the client's real messages, such as its disconnect."""
    pending = [body]

    async def replayed() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replayed


def with_stable_names(body: bytes, aliases: Aliases) -> bytes:
    listing = json.loads(body)
    cards = {card["id"]: card for card in listing["data"]}
    stable = []
    for name in aliases.names:
        routes = [route for route in aliases.routes.get(name, ()) if route.weight > 0 and route.model in cards]
        if routes:
            main = max(routes, key=lambda route: route.weight)
            stable.append({**cards[main.model], "id": name, "root": main.model})
    return json.dumps({**listing, "data": [*stable, *listing["data"]]}).encode()


async def refuse(send: Send, status: int, kind: str, message: str) -> None:
    """An error in the shape that OpenAI's clients read."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    await answer(send, status, body, [(b"retry-after", str(RETRY_AFTER_SECONDS).encode())] if status == 503 else [])


async def answer(send: Send, status: int, body: dict[str, Any], extra: Iterable[tuple[bytes, bytes]] = ()) -> None:
    payload = json.dumps(body).encode()
    headers = with_length([(b"content-type", b"application/json"), *extra], len(payload))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": payload})
