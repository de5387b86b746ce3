"""The agent's calls to vLLM, in the same pod, through the middleware's token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

# Loading reads the adapter from disk and copies it to every GPU; on a busy engine that waits its turn.
LOAD_SECONDS = 600
PROBE_SECONDS = 120
STATE_SECONDS = 5
#: Tokens compared per position; engines may be started with a small --max-logprobs.
LOGPROBS = 5


class EngineAway(Exception):
    """No answer: the engine is starting, restarting or overloaded."""


class EngineRefused(Exception):
    """The engine answered with an error; the message is its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class EngineState:
    """One look at the engine's process: its boot id, the requests being answered per engine name, and how many the
    engine failed to answer per trial."""

    boot: str
    in_flight: dict[str, int]
    failed: dict[str, int] = field(default_factory=dict)


class Engine(Protocol):
    async def state(self) -> EngineState: ...
    async def adapters(self) -> set[str]: ...
    async def load(self, model: str, path: str) -> None: ...
    async def unload(self, model: str) -> None: ...
    async def next_logprobs(self, model: str, prompts: Sequence[str]) -> list[dict[str, float]]: ...


class VllmEngine:
    """vLLM's OpenAI server at `url`."""

    def __init__(self, session: aiohttp.ClientSession, url: str, token: str) -> None:
        self._session = session
        self._url = url
        self._headers = {"X-Finetune-Token": token}

    async def state(self) -> EngineState:
        answer = await self._call("GET", "/finetune/engine", STATE_SECONDS)
        return EngineState(answer["boot"], answer["inFlight"], answer["failed"])

    async def adapters(self) -> set[str]:
        """Engine names of the loaded adapters, without the base model and the middleware's stable names."""
        listing = await self._call("GET", "/v1/models", STATE_SECONDS)
        return {card["id"] for card in listing["data"] if card.get("parent") and "@" in card["id"]}

    async def load(self, model: str, path: str) -> None:
        await self._call("POST", "/v1/load_lora_adapter", LOAD_SECONDS, {"lora_name": model, "lora_path": path})

    async def unload(self, model: str) -> None:
        try:
            await self._call("POST", "/v1/unload_lora_adapter", STATE_SECONDS, {"lora_name": model})
        except EngineRefused as refused:
            if refused.status != 404:
                raise

    async def next_logprobs(self, model: str, prompts: Sequence[str]) -> list[dict[str, float]]:
        """Per prompt, the log probabilities of the likeliest next tokens as `model` (engine name or base) sees them.

        Not `prompt_logprobs`, which would give more positions per request: with LoRA, vLLM 0.32 applies another
        request's adapter to them, and on a CPU it crashes as soon as a second request is in the batch.
        """
        request = {
            "model": model,
            "prompt": list(prompts),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": LOGPROBS,
            "return_tokens_as_token_ids": True,  # two tokens can have the same text
        }
        answer = await self._call("POST", "/v1/completions", PROBE_SECONDS, request)
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        return [{str(t): float(p) for t, p in choice["logprobs"]["top_logprobs"][0].items()} for choice in choices]

    async def _call(self, method: str, path: str, seconds: float, body: dict[str, Any] | None = None) -> Any:
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, self._url + path, json=body, headers=self._headers, timeout=timeout
            ) as response:
                if response.status >= 400:
                    raise EngineRefused(response.status, _error_message(await response.text()))
                if response.content_type == "application/json":
                    return await response.json()
                return await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineAway(f"{method} {path}: {error or type(error).__name__}") from error


def _error_message(text: str) -> str:
    """vLLM's own message out of its error body, or the start of whatever came."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500]
