"""What vLLM is started with besides its arguments: a file, because only the agent has seen model and adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune_serving.artifact import ENGINE_RANKS, Fetched, engine_rank

#: Where transformers keeps a tokenizer's template.
CHAT_TEMPLATE = "chat_template.jinja"


def write(path: Path, base: Path, fetched: Sequence[Fetched], min_rank: int, max_loras: int) -> int:
    """Returns the max-lora-rank. Kept when it is there already: the engine runs with it, only the agent restarted."""
    if path.exists():
        return int(yaml.safe_load(path.read_text(encoding="utf-8"))["max-lora-rank"])
    rank = engine_rank(min(max(min_rank, *(adapter.rank for adapter in fetched), 0), ENGINE_RANKS[-1]))
    config: dict[str, Any] = {
        "model": str(base),
        "enable-lora": True,
        "max-lora-rank": rank,
        "max-loras": max_loras,
        "max-cpu-loras": max_loras,
    }
    if template := missing_template(base, fetched):
        own = path.with_name(CHAT_TEMPLATE)  # the adapter's goes when the adapter does
        replace_file(own, template)
        config["chat-template"] = str(own)
    replace_file(path, yaml.safe_dump(config))
    return rank


def missing_template(base: Path, fetched: Sequence[Fetched]) -> str | None:
    """The chat template of an adapter, for a base model that has none: chat requests need the one it was trained in."""
    tokenizer = base / "tokenizer_config.json"
    if (base / CHAT_TEMPLATE).exists():
        return None
    if tokenizer.exists() and json.loads(tokenizer.read_text(encoding="utf-8")).get("chat_template"):
        return None
    templates = [adapter.path / CHAT_TEMPLATE for adapter in fetched]
    return next((template.read_text(encoding="utf-8") for template in templates if template.exists()), None)


def replace_file(path: Path, text: str) -> None:
    """Readable by this pod's user alone, and never seen half written."""
    draft = path.with_name(path.name + ".new")
    draft.touch(mode=0o600)
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
