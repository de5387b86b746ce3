"""The middleware in front of a small ASGI application that answers like the engine does."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_serving import middleware
from finetune_serving.middleware import AdapterMiddleware
from finetune_serving.routes import Aliases, Route, write_aliases
from finetune_serving.trial import is_streamed_failure

TOKEN = "the agent's token"
OLD, NEW = "support-bot@aaaaaaaaaaaa", "support-bot@bbbbbbbbbbbb"


@dataclass
class Engine:
    """Echoes what reached it, lists its models, streams when asked to."""

    healthy: bool = True
    #: By engine name: a status that it answers with, `raises`, or `breaks off` in the middle of a stream.
    trouble: dict[str, int | str] = field(default_factory=dict)
    reached: list[tuple[str, Any]] = field(default_factory=list)
    headers: dict[bytes, bytes] = field(default_factory=dict)
    hold: asyncio.Event | None = None
    saw_disconnect: bool = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.reached.append((scope["path"], body))
        self.headers = dict(scope["headers"])
        if self.hold:
            await self.hold.wait()
        trouble = self.trouble.get(str((middleware.parse(body) or {}).get("model")))
        if isinstance(trouble, int):
            await self._answer(send, trouble, json.dumps({"error": {"code": trouble}}).encode())
        elif trouble == "raises":
            raise RuntimeError("CUDA error")
        elif trouble == "breaks off":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for event in (b"data: {}\n\n", b'data: {"error": {"message": "m", "code": 500}}\n\n', b"data: [DONE]\n\n"):
                await send({"type": "http.response.body", "body": event, "more_body": event != b"data: [DONE]\n\n"})
        elif scope["path"] == "/health":
            await self._answer(send, 200 if self.healthy else 503, b"")
        elif scope["path"] == "/v1/models":
            cards = [{"id": name, "object": "model", "root": "/models"} for name in ("base", OLD, NEW)]
            await self._answer(send, 200, json.dumps({"object": "list", "data": cards}).encode())
        elif b'"stream": true' in body:
            model = json.loads(body)["model"]
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for token in ("a", "b"):
                event = f'data: {{"model": "{model}", "text": "{token}"}}\n\n'
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            self.saw_disconnect = (await receive())["type"] == "http.disconnect"
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        else:
            await self._answer(send, 200, body)

    async def _answer(self, send: Any, status: int, body: bytes) -> None:
        headers = [(b"content-length", str(len(body)).encode()), (b"x-engine", b"yes")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@dataclass
class Answer:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)


JSON = (b"content-type", b"application/json; charset=utf-8")
AGENT = (JSON, (b"x-finetune-token", TOKEN.encode()))


async def call(
    app: Any,
    method: str,
    path: str,
    *parts: bytes,
    headers: tuple[tuple[bytes, bytes], ...] = (JSON,),
    gone: bool = False,
    app_state: Any = None,
) -> Answer:
    inbox = [
        {"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts or (b"",))
    ]
    if gone:
        inbox = [{"type": "http.request", "body": parts[0], "more_body": True}]
    result = Answer()

    async def receive() -> Any:
        return inbox.pop(0) if inbox else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            result.status, result.headers = message["status"], dict(message["headers"])
        else:
            result.body += message.get("body", b"")
            result.chunks.append(message.get("body", b""))

    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": list(headers)}
    await app({**scope, "app": app_state}, receive, send)
    return result


def chat(model: Any, **more: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "hi \ud83d"}], **more}).encode()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def app(engine: Engine, tmp_path: Path) -> AdapterMiddleware:
    (tmp_path / "token").write_text(TOKEN + "\n")
    return AdapterMiddleware(engine, state=str(tmp_path))


async def boot_of(app: Any) -> str:
    answer = await call(app, "GET", "/finetune/engine", headers=((b"X-Finetune-Token", TOKEN.encode()),))
    boot: str = answer.json()["boot"]
    return boot


async def serve(app: Any, state: Path, *routes: Route, ready: bool = True, message: str = "") -> None:
    names = ("support-bot", "waiting")
    aliases = Aliases(await boot_of(app), ready, message, names, {"support-bot": routes} if routes else {})
    write_aliases(state / "aliases.json", aliases)


async def test_a_stable_name_reaches_the_engine_as_the_digest_name(app: Any, engine: Engine, tmp_path: Path) -> None:
    await serve(app, tmp_path, Route(OLD, 100))
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/tokenize"):
        answer = await call(app, "POST", path, chat("support-bot", seed=7))
        assert answer.json() == {**json.loads(chat(OLD, seed=7))}, path
    assert engine.headers[b"content-length"] == str(len(engine.reached[-1][1])).encode()


async def test_a_new_mapping_moves_the_name_at_once(app: Any, tmp_path: Path) -> None:
    await serve(app, tmp_path, Route(OLD, 100))
    assert (await call(app, "POST", "/v1/completions", chat("support-bot"))).json()["model"] == OLD
    await serve(app, tmp_path, Route(NEW, 100))
    assert (await call(app, "POST", "/v1/completions", chat("support-bot"))).json()["model"] == NEW


async def test_weights_share_the_requests_of_a_name(app: Any, tmp_path: Path) -> None:
    await serve(app, tmp_path, Route(OLD, 75), Route(NEW, 25))
    answered = Counter(
        [(await call(app, "POST", "/v1/completions", chat("support-bot"))).json()["model"] for _ in range(400)]
    )
    assert 240 <= answered[OLD] <= 360
    assert answered[OLD] + answered[NEW] == 400


async def test_weight_zero_is_kept_loaded_but_never_chosen() -> None:
    aliases = Aliases(routes={"bot": (Route(OLD, 100), Route(NEW, 0))})
    assert {aliases.choose("bot", draw / 100) for draw in range(100)} == {OLD}
    assert Aliases(routes={"bot": (Route(NEW, 0),)}).choose("bot", 0.5) is None


async def test_a_streamed_answer_is_passed_on_piece_by_piece(app: Any, engine: Engine, tmp_path: Path) -> None:
    await serve(app, tmp_path, Route(OLD, 100))
    answer = await call(app, "POST", "/v1/chat/completions", chat("support-bot", stream=True))
    assert len(answer.chunks) == 3 and answer.body.count(OLD.encode()) == 2
    assert engine.saw_disconnect, "the engine must see that the client left"


async def test_digest_names_base_and_unknown_names_go_to_the_engine_unchanged(
    app: Any, engine: Engine, tmp_path: Path
) -> None:
    await serve(app, tmp_path, Route(OLD, 100))
    for model in (NEW, "base", "nobody", None, 7, ["support-bot"]):
        sent = chat(model)
        await call(app, "POST", "/v1/completions", sent)
        assert engine.reached[-1][1] == sent


@pytest.mark.parametrize(
    "body, headers",
    [
        (b'{"model": "support-bot"', (JSON,)),
        (b'["support-bot"]', (JSON,)),
        (b"\xff\xfe", (JSON,)),
        (b'{"model": "support-bot"}', ((b"content-type", b"multipart/form-data; boundary=x"),)),
        (b'{"model": "support-bot"}', (JSON, (b"content-encoding", b"gzip"))),
        (b'{"model": "support-bot"}', ()),
    ],
)
async def test_what_is_not_a_json_object_is_left_to_the_engine(
    app: Any, engine: Engine, tmp_path: Path, body: bytes, headers: Any
) -> None:
    await serve(app, tmp_path, Route(OLD, 100))
    await call(app, "POST", "/v1/completions", body, headers=headers)
    assert engine.reached == [("/v1/completions", body)]


async def test_a_body_in_many_pieces_is_read_whole(app: Any, tmp_path: Path) -> None:
    await serve(app, tmp_path, Route(OLD, 100))
    body = chat("support-bot")
    answer = await call(app, "POST", "/v1/completions", body[:5], body[5:20], body[20:])
    assert answer.json()["model"] == OLD


async def test_a_client_that_leaves_while_sending_reaches_nothing(app: Any, engine: Engine) -> None:
    answer = await call(app, "POST", "/v1/completions", b'{"mod', gone=True)
    assert answer.status == 0 and engine.reached == []


async def test_a_body_over_the_bound_is_refused(app: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY", 100)
    assert (await call(app, "POST", "/v1/completions", b" " * 60, b" " * 60)).status == 413
    announced = (JSON, (b"content-length", b"101"))
    assert (await call(app, "POST", "/v1/completions", b"", headers=announced)).status == 413
    assert engine.reached == []


async def test_a_known_name_without_a_verified_adapter_is_503_with_retry_after(app: Any, tmp_path: Path) -> None:
    await serve(app, tmp_path, Route(OLD, 100))
    answer = await call(app, "POST", "/v1/completions", chat("waiting"))
    assert answer.status == 503 and answer.headers[b"retry-after"] == b"5"
    assert "'waiting' is being loaded" in answer.json()["error"]["message"]


async def test_after_an_engine_restart_the_old_mapping_counts_no_more(app: Any, engine: Engine, tmp_path: Path) -> None:
    await serve(app, tmp_path, Route(OLD, 100))
    restarted = AdapterMiddleware(engine, state=str(tmp_path))
    assert (await call(restarted, "POST", "/v1/completions", chat("support-bot"))).status == 503
    assert (await call(restarted, "GET", "/finetune/ready")).status == 503
    assert (await call(app, "GET", "/finetune/ready")).status == 200
    assert await boot_of(app) != await boot_of(restarted)


async def test_ready_says_what_is_missing_and_asks_the_engine_last(app: Any, engine: Engine, tmp_path: Path) -> None:
    assert (await call(app, "GET", "/finetune/ready")).status == 503
    await serve(app, tmp_path, Route(OLD, 100), ready=False, message="support-bot: downloading")
    answer = await call(app, "GET", "/finetune/ready")
    assert answer.status == 503 and answer.json()["message"] == "support-bot: downloading"
    await serve(app, tmp_path, Route(OLD, 100))
    assert (await call(app, "GET", "/finetune/ready")).status == 200
    engine.healthy = False
    assert (await call(app, "GET", "/finetune/ready")).status == 503


async def test_the_model_list_starts_with_the_stable_names(app: Any, tmp_path: Path) -> None:
    await serve(app, tmp_path, Route(OLD, 10), Route(NEW, 90))
    answer = await call(app, "GET", "/v1/models")
    assert [card["id"] for card in answer.json()["data"]] == ["support-bot", "base", OLD, NEW]
    assert answer.json()["data"][0]["root"] == NEW
    assert answer.headers[b"content-length"] == str(len(answer.body)).encode() and answer.headers[b"x-engine"] == b"yes"


CLOSED = [
    "/v1/load_lora_adapter",
    "/v1/load_lora_adapter/",
    "/v1/unload_lora_adapter",
    "/adapters",
    "/adapters/x",
    "/invocations",
    "/sleep",
    "/wake_up",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/server_info",
    "/update_weights",
    "/pause",
    "/abort_requests",
    "/start_profile",
    "/scale_elastic_ep",
    "/tokenizer_info",
    "/inference/v1/generate",
    "/finetune/engine",
]


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize(
    "headers", [(JSON,), (JSON, (b"x-finetune-token", b"a guess")), (JSON, (b"x-finetune-token", b""))]
)
async def test_administrative_endpoints_are_closed_to_clients(
    app: Any, engine: Engine, path: str, headers: Any
) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = await call(app, method, path, b'{"lora_name": "x", "lora_path": "/etc"}', headers=headers)
        assert answer.status == 403
    assert engine.reached == []


async def test_without_a_token_file_nobody_is_trusted(engine: Engine, tmp_path: Path) -> None:
    for content in (None, "", "\n"):
        if content is not None:
            (tmp_path / "token").write_text(content)
        app = AdapterMiddleware(engine, state=str(tmp_path))
        answer = await call(app, "POST", "/v1/load_lora_adapter", b"{}", headers=(JSON, (b"x-finetune-token", b"")))
        assert answer.status == 403


async def test_the_agent_may_load_and_brings_the_engines_own_key(
    app: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-engine")
    agent = (JSON, (b"x-finetune-token", TOKEN.encode()))
    assert (await call(app, "POST", "/v1/load_lora_adapter", b"{}", headers=agent)).status == 200
    assert engine.headers[b"authorization"] == b"Bearer sk-engine"
    await call(app, "POST", "/v1/completions", chat("base"))
    assert b"authorization" not in engine.headers, "a client brings its own key"


async def test_requests_are_counted_until_they_are_answered(app: Any, engine: Engine, tmp_path: Path) -> None:
    await serve(app, tmp_path, Route(OLD, 100))
    engine.hold = asyncio.Event()
    request = asyncio.create_task(call(app, "POST", "/v1/completions", chat("support-bot")))
    while not engine.reached:
        await asyncio.sleep(0)
    agent = ((b"x-finetune-token", TOKEN.encode()),)
    assert (await call(app, "GET", "/finetune/engine", headers=agent)).json()["inFlight"] == {OLD: 1}
    engine.hold.set()
    await request
    assert (await call(app, "GET", "/finetune/engine", headers=agent)).json()["inFlight"] == {}


# ---- canary ----------------------------------------------------------------------------------------------------------

ALL_TO_CANARY = (Route(NEW, 10**9, "trial-1"), Route(OLD, 1))


async def failures(app: Any) -> dict[str, int]:
    found: dict[str, int] = (await call(app, "GET", "/finetune/engine", headers=AGENT)).json()["failed"]
    return found


@pytest.mark.parametrize("trouble", [500, 503, "raises"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_canary_fails_to_answer_is_counted_and_answered_by_the_adapter_beside_it(
    app: Any, engine: Engine, tmp_path: Path, trouble: int | str, stream: bool
) -> None:
    await serve(app, tmp_path, *ALL_TO_CANARY)
    engine.trouble = {NEW: trouble}
    for count in (1, 2):
        answer = await call(app, "POST", "/v1/completions", chat("support-bot", stream=stream))
        assert answer.status == 200 and OLD.encode() in answer.body and NEW.encode() not in answer.body
        assert await failures(app) == {"trial-1": count}


async def test_a_clients_own_mistake_is_no_failure_of_the_canary(app: Any, engine: Engine, tmp_path: Path) -> None:
    await serve(app, tmp_path, *ALL_TO_CANARY)
    engine.trouble = {NEW: 400}
    assert (await call(app, "POST", "/v1/completions", chat("support-bot"))).status == 400
    assert await failures(app) == {} and len(engine.reached) == 1


async def test_a_stream_that_breaks_off_is_counted_and_not_begun_again(
    app: Any, engine: Engine, tmp_path: Path
) -> None:
    await serve(app, tmp_path, *ALL_TO_CANARY)
    engine.trouble = {NEW: "breaks off"}
    answer = await call(app, "POST", "/v1/completions", chat("support-bot", stream=True))
    assert len(answer.chunks) == 3 and await failures(app) == {"trial-1": 1} and len(engine.reached) == 1


@pytest.mark.parametrize("trouble, status", [(500, 500), ("raises", None)])
async def test_who_asks_for_the_canarys_digest_hears_its_failure(
    app: Any, engine: Engine, tmp_path: Path, trouble: int | str, status: int | None
) -> None:
    await serve(app, tmp_path, *ALL_TO_CANARY)
    engine.trouble = {NEW: trouble}
    if status is None:
        with pytest.raises(RuntimeError, match="CUDA error"):
            await call(app, "POST", "/v1/completions", chat(NEW))
    else:
        assert (await call(app, "POST", "/v1/completions", chat(NEW))).status == status
    assert await failures(app) == {"trial-1": 1}


async def test_failures_of_others_and_of_the_agents_probes_are_not_counted(
    app: Any, engine: Engine, tmp_path: Path
) -> None:
    await serve(app, tmp_path, *ALL_TO_CANARY)
    engine.trouble = {NEW: 500, OLD: 500, "base": 500}
    for model, headers in ((NEW, AGENT), (OLD, (JSON,)), ("base", (JSON,))):
        assert (await call(app, "POST", "/v1/completions", chat(model), headers=headers)).status == 500
    assert await failures(app) == {}


@pytest.mark.parametrize(
    "chunk, failed",
    [
        (b'data: {"error": {"code": 500}}\n\n', True),
        (b'data: {"error": {"code": 400}}\n\n', False),
        (b'data: {"error": "no code"}\n\n', True),
        (b'data: {"choices": []}\n\n', False),
        (b"", False),
    ],
)
def test_a_streamed_error_says_whose_fault_it_is(chunk: bytes, failed: bool) -> None:
    assert is_streamed_failure(chunk) == failed


async def test_a_root_path_opens_nothing(app: Any, engine: Engine) -> None:
    scope = {"type": "http", "method": "POST", "path": "/api/adapters", "root_path": "/api", "headers": [JSON]}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, None, send)
    assert sent[0]["status"] == 403 and engine.reached == []


async def test_a_websocket_and_the_lifespan_are_passed_on_or_closed() -> None:
    seen: list[str] = []

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    app = AdapterMiddleware(engine, state="/nowhere")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    for scope in ({"type": "lifespan"}, {"type": "websocket", "path": "/v1/realtime"}):
        await app(scope, None, send)  # type: ignore[arg-type]
    await app({"type": "websocket", "path": "/adapters"}, None, send)  # type: ignore[arg-type]
    assert seen == ["lifespan", "websocket"] and sent == [{"type": "websocket.close", "code": 1008}]


class Vllm:
    """What the middleware touches of vLLM's application state."""

    def __init__(self, **loaded: int) -> None:
        requests = {name: SimpleNamespace(lora_int_id=number) for name, number in loaded.items()}
        self.removed: list[int] = []
        self.state = SimpleNamespace(openai_serving_models=SimpleNamespace(lora_requests=requests), engine_client=self)

    async def remove_lora(self, number: int) -> bool:
        self.removed.append(number)
        return True


async def test_unloading_frees_the_adapters_slot(app: Any, engine: Engine) -> None:
    vllm = Vllm(bot=7)
    body = b'{"lora_name": "bot"}'
    assert (await call(app, "POST", "/v1/unload_lora_adapter", body, headers=AGENT, app_state=vllm)).status == 200
    assert vllm.removed == [7] and engine.reached == [("/v1/unload_lora_adapter", body)]


async def test_unloading_works_in_a_vllm_that_keeps_its_state_elsewhere(app: Any, engine: Engine) -> None:
    for state in (None, object(), SimpleNamespace(state=SimpleNamespace()), Vllm()):
        body = b'{"lora_name": "bot"}'
        assert (await call(app, "POST", "/v1/unload_lora_adapter", body, headers=AGENT, app_state=state)).status == 200


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}])
async def test_what_ends_a_cpu_engine_is_refused_there_and_only_there(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    on_gpu = AdapterMiddleware(engine, state=str(tmp_path))
    monkeypatch.setenv("FINETUNE_REFUSE_PROMPT_LOGPROBS", "true")
    on_cpu = AdapterMiddleware(engine, state=str(tmp_path))
    refused = await call(on_cpu, "POST", "/v1/completions", chat("base", **asked))
    assert refused.status == 400 and "mode: Merge" in refused.json()["error"]["message"]
    assert (await call(on_cpu, "POST", "/v1/completions", chat("base", logprobs=1))).status == 200
    assert (await call(on_gpu, "POST", "/v1/completions", chat("base", **asked))).status == 200
