"""Asks a served model, as any client of the OpenAI API would."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any


class AskFailed(Exception):
    """The server's own words."""


@dataclass(frozen=True)
class Answer:
    model: str
    """The model that answered, by digest: `support-bot@3f9a1c20b7de`."""
    text: str


def ask(address: str, model: str, question: str, max_tokens: int = 40, timeout: float = 60) -> Answer:
    request = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    reply = call(address, "/v1/chat/completions", request, timeout)
    return Answer(reply["model"], reply["choices"][0]["message"]["content"].strip())


def models(address: str) -> list[dict[str, Any]]:
    return list(call(address, "/v1/models")["data"])


def base_model_name(address: str) -> str:
    """The name that the base model is served under: the model that is not an adapter of another."""
    listed = models(address)
    bases = [entry["id"] for entry in listed if not entry.get("parent")]
    if not bases:
        raise AskFailed(f"no base model among the served models: {[entry['id'] for entry in listed]}")
    return str(bases[0])


def call(address: str, path: str, body: Any = None, timeout: float = 60) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise AskFailed(f"{path}: HTTP {error.code}: {error.read().decode(errors='replace')[:500]}") from error
