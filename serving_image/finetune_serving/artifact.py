"""Fetching base model and adapters by digest, and refusing an adapter that vLLM would serve wrongly or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_serving.desired import DesiredAdapter, DesiredBase
from finetune_trainer.digest import hex_of
from finetune_trainer.methods.servable import MERGE_INSTEAD, mount_refusal, rank_of
from finetune_trainer.sources import servedbase
from finetune_trainer.storage.store import Store

log = logging.getLogger(__name__)

#: The values that vLLM 0.32 takes for --max-lora-rank (vllm/config/lora.py).
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Unservable(Exception):
    """This adapter cannot be served as asked; `reason` is one CamelCase word, `message` says what to do."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class Fetched:
    """An adapter on this pod's disk, every file verified."""

    path: Path
    rank: int
    prompts: tuple[str, ...] = ()


def fetch_base(store: Store, base: DesiredBase, models: Path) -> servedbase.ServedBase:
    """The base model's folder, verified, and its digest even if nobody knew it."""
    return servedbase.fetch(store, base.uri, base.digest, models / "base")


def fetch_adapter(store: Store, adapter: DesiredAdapter, base_digest: str, adapters: Path) -> Fetched:
    """Downloads and verifies one adapter. RunFailure of the store, or Unservable."""
    target = adapters / hex_of(adapter.digest)
    log.info("%s: downloading %s", adapter.name, adapter.uri)
    manifest = store.at(adapter.uri).download_tree("", target, adapter.digest)
    fetched = check(adapter.name, target, manifest, base_digest)
    log.info("%s: verified %s (%s, rank %d)", adapter.name, adapter.digest, size_of(manifest), fetched.rank)
    return fetched


def check(name: str, directory: Path, manifest: dict[str, Any], base_digest: str) -> Fetched:
    """What the engine itself would accept silently and serve wrongly, checked before it sees the adapter."""
    trained_on = (manifest.get("baseModel") or {}).get("digest", "")
    if trained_on and base_digest and trained_on != base_digest:
        raise Unservable(
            "BaseModelMismatch",
            f"{name} was trained on base model {trained_on}, this deployment serves {base_digest}: "
            "deploy it with the base model that it was trained on",
        )
    if not (directory / WEIGHTS).is_file():
        raise Unservable("NotSafetensors", f"{name} has no {WEIGHTS}; pickled weights are never loaded")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Unservable("NotAnAdapter", f"{name} has no {CONFIG}: uri must name the adapter's folder") from error
    except ValueError as error:
        raise Unservable("NotAnAdapter", f"{name}: {CONFIG} is not JSON ({error})") from error
    if refusal := mount_refusal(config):
        raise Unservable("UnsupportedAdapter", f"{name}: {refusal}")
    prompts = tuple(str(prompt) for prompt in manifest.get("prompts", []))
    return Fetched(directory, rank_of(config), prompts)


def engine_rank(needed: int) -> int:
    """The smallest rank that vLLM can be started with and that is not below `needed`."""
    for rank in ENGINE_RANKS:
        if rank >= needed:
            return rank
    raise Unservable("RankTooLarge", f"rank {needed} is above vLLM's largest, {ENGINE_RANKS[-1]}; {MERGE_INSTEAD}")


def discard(directory: Path) -> None:
    """Frees the disk of an adapter that nothing serves any more."""
    shutil.rmtree(directory, ignore_errors=True)


def install(package: Path, python: Path) -> None:
    """Copies our package to where the engine's PYTHONPATH finds it, in one step: the engine may be starting."""
    target = python / package.name
    draft = python / f".{package.name}.new"
    python.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(package, draft, ignore=shutil.ignore_patterns("__pycache__"))
    if target.exists():
        old = python / f".{package.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(draft, target)
        shutil.rmtree(old)
    else:
        os.replace(draft, target)


def size_of(manifest: dict[str, Any]) -> str:
    files = manifest["files"]
    return f"{len(files)} files, {sum(int(file['size']) for file in files) / 1e6:.1f} MB"
