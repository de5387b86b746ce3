"""Requests that never stop while something is swapped behind them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Self

from e2e.demo.chat import AskFailed, ask

QUESTION = "How do I reset the Zorblax router?"


@dataclass
class Client:
    """Asks again and again in the background, as production traffic would."""

    address: str
    model: str
    every: float = 0.2
    answered_by: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        while not self._stop.wait(self.every):
            try:
                self.answered_by.append(ask(self.address, self.model, QUESTION, max_tokens=8).model)
            except (AskFailed, OSError) as failure:
                self.failures.append(str(failure))
