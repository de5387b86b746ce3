"""Logs as one JSON object per line; every line written while an object is looked at names the object and its run."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune_operator.queue import Key
from finetune_operator.times import micro_time, utc_now

_about: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("about", default={})  # noqa: B039


@contextmanager
def about(key: Key) -> Iterator[None]:
    """Lines written inside carry kind, namespace and name of `key`."""
    token = _about.set({"kind": key.kind, "namespace": key.namespace, "name": key.name})
    try:
        yield
    finally:
        _about.reset(token)


def about_run(run: str) -> None:
    """Lines written from now on, inside `about`, carry the id of the run too."""
    if _about.get():
        _about.get()["run"] = run


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": micro_time(utc_now()),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
            **_about.get(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # kopf says "Handler 'x' succeeded" for every single event, aiohttp logs every probe.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
