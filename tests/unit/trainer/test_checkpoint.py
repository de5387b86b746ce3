"""Checkpoints in a store: what can be gone on from, and what is passed over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune_trainer.digest import MANIFEST, hash_tree, manifest_of
from finetune_trainer.runspec import Storage
from finetune_trainer.storage.store import Store
from finetune_trainer.training.checkpoint import Checkpoints, Snapshot, State


def checkpoints(folder: Path, run: str = "runs/abc") -> Checkpoints:
    return Checkpoints(Store(Storage(uri=f"file://{folder}/bucket")), run, folder / "scratch", keep=9)


def save(folder: Path, step: int, run: str = "runs/abc") -> Path:
    """A checkpoint of one step; the folder that holds it."""
    saving = checkpoints(folder, run)
    tensors = {"trainable": {"weight": torch.full((64,), float(step))}, "optimizer": {"weight/exp_avg": torch.ones(64)}}
    saving.save(Snapshot(State(step=step, metrics=[{"step": step, "loss": 1.0}]), tensors))
    saving.wait()
    return folder / "bucket" / run / f"checkpoints/step-{step}"


def rewrite_manifest(folder: Path, **fields: object) -> None:
    """A manifest that matches the files as they are now."""
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest_of(hash_tree(folder), **{"run": "abc", "step": 6, **fields})))


def truncate(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def flip_a_bit(folder: Path) -> None:
    file = folder / "trainable.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def take_a_file(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


def take_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def halve_the_manifest(folder: Path) -> None:
    content = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(content[: len(content) // 2])


def empty_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def put_another_step_there(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-3"), folder)


def put_another_run_there(folder: Path) -> None:
    other = save(folder.parents[4], 6, "runs/def")
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def write_a_state_of_another_version(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"step": 6, "a field of tomorrow": 1}))
    rewrite_manifest(folder)


def write_no_tensors(folder: Path) -> None:
    (folder / "trainable.safetensors").write_bytes(b"these are not tensors")
    rewrite_manifest(folder)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        take_a_file,
        take_the_manifest,
        halve_the_manifest,
        empty_the_manifest,
        put_another_step_there,
        put_another_run_there,
        write_a_state_of_another_version,
        write_no_tensors,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_checkpoint_is_passed_over_with_a_log_line(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 3)
    newest = save(tmp_path, 6)
    before = checkpoints(tmp_path).newest()
    assert before is not None and before.state.step == 6
    damage(newest)
    found = checkpoints(tmp_path).newest()
    assert found is not None and found.state.step == 3
    assert torch.equal(found.tensors["trainable"]["weight"], torch.full((64,), 3.0))
    assert "checkpoint: step-6" in caplog.text and "skipped" in caplog.text


def test_a_checkpoint_that_is_cut_off_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    saving = checkpoints(tmp_path)
    monkeypatch.setattr(saving.store, "put_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    saving.save(Snapshot(State(step=6), {"trainable": {"weight": torch.ones(2)}}))
    with pytest.raises(KeyboardInterrupt):
        saving.wait()
    found = checkpoints(tmp_path).newest()
    assert found is not None and found.state.step == 3
