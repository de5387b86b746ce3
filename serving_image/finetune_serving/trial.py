"""A canary's answers on their way to the client: whether one failed, and whether another adapter can still answer.

Standard library only: it is imported inside the engine's process, whose image we do not choose.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

#: How vLLM ends a streamed answer that failed after its status was sent.
STREAMED_ERROR = b'data: {"error"'


class Answer:
    """Passes an answer on. A failure that comes before anything was sent is kept back if `replaceable`."""

    def __init__(self, send: Send, *, replaceable: bool) -> None:
        self._send = send
        self._replaceable = replaceable
        self.started = False
        self.failed = False

    @property
    def kept_back(self) -> bool:
        """The client has heard nothing yet, so somebody else can answer."""
        return self.failed and self._replaceable and not self.started

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.failed = message["status"] >= 500
        elif is_streamed_failure(message.get("body", b"")):
            self.failed = True
        if not self.kept_back:
            self.started = True
            await self._send(message)


def is_streamed_failure(chunk: bytes) -> bool:
    """The engine's fault, as an event of a stream; an error that is the client's fault has a code below 500."""
    if not chunk.startswith(STREAMED_ERROR):
        return False
    try:
        return int(json.loads(chunk.removeprefix(b"data: ").split(b"\n", 1)[0])["error"]["code"]) >= 500
    except (ValueError, KeyError, TypeError):
        return True  # an error that says nothing about whose fault it is
