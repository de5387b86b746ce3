"""A fake engine: answers as vLLM does on the endpoints that the agent uses, behind the real middleware.

What an adapter does to its answers is decided by its weights file: the text `no effect` changes nothing.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

from finetune_serving.engine import EngineAway, EngineRefused, VllmEngine
from finetune_serving.middleware import AdapterMiddleware

Scope = Any


class FakeEngine:
    """The ASGI application and its process; `restart` is a new process that has loaded nothing."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.loaded: dict[str, Path] = {}
        self.loads: list[str] = []
        self.probes: list[str] = []
        self.fail_loads: list[str] = []
        self.fail_answers: set[str] = set()
        self.hold_loads: asyncio.Event | None = None  # until it is set
        self.hold_answers: asyncio.Event | None = None
        self.held = 0  # requests for an answer, so far
        self.up = True
        self.restart()

    def restart(self) -> None:
        self.loaded = {}
        self.app = AdapterMiddleware(self._serve, state=str(self.state))

    async def call(self, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
        """One request through the middleware."""
        payload, sent = json.dumps(body).encode(), []
        inbox = [{"type": "http.request", "body": payload if body is not None else b"", "more_body": False}]
        headers = [(b"content-type", b"application/json"), (b"x-finetune-token", token.encode())]

        async def receive() -> Any:
            return inbox.pop() if inbox else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": headers}
        await self.app(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], json.loads(content) if content else None

    async def _serve(self, scope: Scope, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"] or b"null")
        status, answer = await self._answer(scope["path"], body)
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def _answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            adapters = [{"id": name, "parent": "base"} for name in self.loaded]
            return 200, {"data": [{"id": "base", "parent": None}, *adapters]}
        if path == "/v1/load_lora_adapter":
            return await self._load(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter":
            found = self.loaded.pop(body["lora_name"], None)
            return (200, "Success") if found else (404, _error("cannot be found"))
        model = body["model"]
        if model != "base" and model not in self.loaded:
            return 404, _error(f"The model `{model}` does not exist.")
        if hold := self.hold_answers:
            self.held += 1
            await hold.wait()
        if isinstance(body.get("prompt"), list):
            self.probes.append(model)
            choices = [
                {"index": index, "logprobs": {"top_logprobs": [self._likeliest(model, text)]}}
                for index, text in enumerate(body["prompt"])
            ]
            return 200, {"model": model, "choices": choices}
        if model in self.fail_answers:
            return 500, _error("CUDA error")
        return 200, {"model": model, "choices": [{"index": 0, "text": "."}]}

    async def _load(self, name: str, path: Path) -> tuple[int, Any]:
        if hold := self.hold_loads:
            await hold.wait()
        if name in self.loaded:
            return 400, _error("has already been loaded")
        if self.fail_loads:
            return 500, _error(self.fail_loads.pop())
        assert (path / "adapter_config.json").exists()
        self.loaded[name] = path
        self.loads.append(name)
        return 200, "Success"

    def _likeliest(self, model: str, text: str) -> dict[str, float]:
        weights = b"" if model == "base" else (self.loaded[model] / "adapter_model.safetensors").read_bytes()
        effect = 0.0 if weights.startswith(b"no effect") or not weights else 0.1 + len(weights) % 7 / 10
        return {f"token_id:{n}": -1.0 - n / 3 - len(text) / 100 - effect * n for n in range(5)}


class Client(VllmEngine):
    """The agent's own client, its HTTP replaced by direct calls of the application."""

    def __init__(self, fake: FakeEngine, token: str) -> None:
        self._fake, self._token = fake, token

    async def _call(self, method: str, path: str, seconds: float, body: dict[str, Any] | None = None) -> Any:
        if not self._fake.up:
            raise EngineAway(f"{method} {path}: connection refused")
        status, answer = await self._fake.call(method, path, body, self._token)
        if status >= 400:
            raise EngineRefused(status, answer["error"]["message"])
        return answer


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}
