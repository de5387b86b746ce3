"""Checkpoints in the bucket: everything a run needs to go on as if nothing had happened, in safetensors and JSON.

There is no random state in them: every micro batch seeds itself (fit.py). There is no scheduler state: the rate is a function of
the step. So a checkpoint is the trained weights, the optimizer's memory and a few numbers.
"""

import json
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune_trainer.digest import MANIFEST, without_nan
from finetune_trainer.failures import DIGEST_MISMATCH, DOWNLOAD_FAILED, RunFailure
from finetune_trainer.storage.connection import full_disk
from finetune_trainer.storage.store import Store

log = logging.getLogger(__name__)

STATE = "state.json"
METRICS = "metrics.jsonl"


@dataclass
class State:
    """What a run remembers beside its tensors."""

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int = 0
    stale_evaluations: int = 0
    eval_loss: float | None = None
    last_loss: float | None = None
    loss_scale: dict[str, Any] = field(default_factory=dict)  # float16 only
    optimizer: dict[str, Any] = field(default_factory=dict)  # its numbers
    method: dict[str, Any] = field(default_factory=dict)  # AdaLoRA's rank pattern
    metrics: list[dict[str, Any]] = field(default_factory=list)  # one entry per step, kept in metrics.jsonl


@dataclass
class Snapshot:
    """A moment of a run: named tensors by file (trainable, optimizer, initial, best, method) and the state."""

    state: State
    tensors: dict[str, dict[str, torch.Tensor]]

    def on_cpu(self) -> "Snapshot":
        """A copy that training no longer changes."""
        copies = {
            file: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            for file, tensors in self.tensors.items()
        }
        state = State(**{**asdict(self.state), "metrics": list(self.state.metrics)})
        return Snapshot(state, copies)


def write(snapshot: Snapshot, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in snapshot.tensors.items():
        if tensors:
            save_file(tensors, folder / f"{file}.safetensors")
    state = asdict(snapshot.state)
    lines = state.pop("metrics")
    (folder / STATE).write_text(json.dumps(state, sort_keys=True))
    (folder / METRICS).write_text("".join(json.dumps(without_nan(line)) + "\n" for line in lines))


def read(folder: Path) -> Snapshot:
    state = State(**json.loads((folder / STATE).read_text()))
    state.metrics = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return Snapshot(state, {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))})


class Checkpoints:
    """The checkpoints of one run, in `<run>/checkpoints/step-<n>/` of the store.

    Uploads run beside the training, one at a time; a failed one fails the run at the next save. With each the run's
    metrics.jsonl becomes what it was at that step.
    """

    def __init__(self, store: Store, run: str, scratch: Path, keep: int) -> None:
        self.store, self.run, self.scratch, self.keep = store, run, scratch, keep
        self.run_id = run.rpartition("/")[2]
        self.prefix = f"{run}/checkpoints"
        self._uploader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None

    def steps(self) -> dict[int, bool]:
        """{step: whether its manifest is there}, newest first."""
        found: dict[int, bool] = {}
        for entry in self.store.list(self.prefix):
            name, _, file = entry.key.removeprefix(f"{self.prefix}/").partition("/")
            if name.startswith("step-") and name[5:].isdigit():
                step = int(name[5:])
                found[step] = found.get(step, False) or file == MANIFEST
        return dict(sorted(found.items(), reverse=True))

    def newest(self) -> Snapshot | None:
        """The newest checkpoint whose every file matches its manifest; others are skipped, and said so."""
        for step, complete in self.steps().items():
            if not complete:
                log.warning("checkpoint: step-%d is incomplete (no manifest); skipped", step)
                continue
            try:
                return self.at(step)
            except RunFailure as failure:
                if failure.reason not in (DIGEST_MISMATCH, DOWNLOAD_FAILED):
                    raise
                log.warning("checkpoint: step-%d cannot be trusted (%s); skipped", step, failure.message)
        return None

    def at(self, step: int) -> Snapshot:
        """The checkpoint of one step. Raises: RunFailure when it is not what its manifest and its name say."""
        folder, prefix = self.scratch / f"resume-{step}", f"{self.prefix}/step-{step}"
        try:
            manifest = self.store.download_tree(prefix, folder)
            if (manifest.get("run"), manifest.get("step")) != (self.run_id, step):
                of = f"step {manifest.get('step')} of run {manifest.get('run')}"
                raise RunFailure(DIGEST_MISMATCH, f"{self.store.uri(prefix)} is {of}")
            return read(folder)
        except (ValueError, TypeError, KeyError, FileNotFoundError, SafetensorError) as error:
            raise RunFailure(DIGEST_MISMATCH, f"{self.store.uri(prefix)} cannot be read: {error!r}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def save(self, snapshot: Snapshot) -> None:
        """Begin to upload a checkpoint. Raises: RunFailure of the one before, if that failed."""
        self.wait()
        self._upload = self._uploader.submit(self._save, snapshot.on_cpu())

    def wait(self) -> None:
        """Wait for the upload in progress. Raises: its RunFailure."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def _save(self, snapshot: Snapshot) -> None:
        step = snapshot.state.step
        folder = self.scratch / f"step-{step}"
        try:
            with full_disk(folder):
                write(snapshot, folder)
            self.store.upload_tree(folder, f"{self.prefix}/step-{step}", {"run": self.run_id, "step": step})
            self.store.put_file(f"{self.run}/{METRICS}", folder / METRICS)
            log.info("checkpoint: step-%d saved to %s", step, self.store.uri(f"{self.prefix}/step-{step}"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._forget_older(step)

    def _forget_older(self, step: int) -> None:
        older = {other: complete for other, complete in self.steps().items() if other < step}
        kept = [other for other, complete in older.items() if complete][: self.keep - 1]
        for other in older:
            if other not in kept:
                self.store.delete(f"{self.prefix}/step-{other}")
