"""The agent's reports to the operator: at once when something changed, otherwise every few seconds."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from finetune_serving.desired import AgentReport

log = logging.getLogger("report")

EVERY_SECONDS = 5.0
#: Changes within this time go out together.
SETTLE_SECONDS = 0.5
ANSWER_SECONDS = 10


class Reporter:
    """Keeps the newest report; sending never delays serving."""

    def __init__(self, url: str, token: Path, ca: Path) -> None:
        self._url, self._token, self._ca = url, token, ca
        self._report = AgentReport()
        self._sent: AgentReport | None = None
        self._news = asyncio.Event()
        self._trouble = ""

    def offer(self, report: AgentReport) -> None:
        self._report = report
        if report != self._sent:
            self._news.set()

    async def answers(self) -> AsyncIterator[dict[str, Any]]:
        """Sends for ever and yields each desired set that the operator answers with."""
        if not self._url:
            log.warning("no report URL is set: the desired set comes from the ConfigMap alone")
            await asyncio.Event().wait()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session:
            while True:
                answer = await self._send(session)
                if answer:
                    yield answer
                await self._wait()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._news.wait(), EVERY_SECONDS)
            await asyncio.sleep(SETTLE_SECONDS)
        except TimeoutError:
            return

    async def _send(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        self._news.clear()
        report = self._report
        try:
            # The kubelet renews the token's file; a token read once would be refused after an hour.
            headers = {"Authorization": f"Bearer {self._token.read_text(encoding='utf-8').strip()}"}
            body = report.model_dump(mode="json", by_alias=True)
            async with session.post(self._url, json=body, headers=headers, ssl=self._tls()) as response:
                if response.status != 200:
                    self._say(f"{response.status} {(await response.text())[:200]}")
                    return {}
                answer: dict[str, Any] = await response.json()
        except (OSError, aiohttp.ClientError, TimeoutError, ValueError) as error:
            self._say(str(error) or type(error).__name__)
            return {}
        self._sent = report
        self._say("")
        return answer

    def _tls(self) -> ssl.SSLContext | bool:
        return ssl.create_default_context(cafile=str(self._ca)) if self._ca.exists() else True

    def _say(self, trouble: str) -> None:
        """One line when it starts to fail and one when it works again, not one every few seconds."""
        if trouble and not self._trouble:
            log.warning(
                "the operator does not take reports: %s (serving goes on; trying every %.0f s)", trouble, EVERY_SECONDS
            )
        elif self._trouble and not trouble:
            log.info("the operator takes reports again")
        self._trouble = trouble
