"""`finetune run`: prepare and train a FineTune file on this machine, with the code and the layout of its Jobs.

    finetune run finetune.yaml --output artifacts

A folder takes the bucket's place. The same inputs are the same run: what is trained already is found again, what was
interrupted goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_operator.api.dataset import DatasetSource
from finetune_operator.api.finetune import FineTune
from finetune_operator.api.finetunestatus import ExportStatus
from finetune_trainer.command.finetunefile import BadFile, config_map_file, read_finetune
from finetune_trainer.data.rows import DataFile
from finetune_trainer.failures import (
    BASE_MODEL_GATED,
    CUDA_OUT_OF_MEMORY,
    DISK_FULL,
    HUB_UNAUTHORIZED,
    STORAGE_UNAUTHORIZED,
    STORAGE_UNAVAILABLE,
    RunFailure,
    out_of_space,
)
from finetune_trainer.runspec import PrepareResult, RunSpec, Storage, TrainResult
from finetune_trainer.sources.datafiles import files_at
from finetune_trainer.stage import DONE, FAILED, INTERRUPTED, Interrupted, quiet_libraries

if TYPE_CHECKING:
    from finetune_trainer.storage.store import Store

ROLES = ("train", "evaluation")
WAIT_SECONDS = 30.0  # of an unreachable bucket: someone sits and waits


def main(arguments: argparse.Namespace) -> int:
    """Train a file's FineTune; 0 with an adapter, 1 with a reason on stderr, 143 with a checkpoint."""
    try:
        return _run(arguments)
    except BadFile as bad:
        print(bad, file=sys.stderr)
    except RunFailure as failure:
        print(f"{failure.reason}: {failure.message}{_hint(failure)}", file=sys.stderr)
    except Interrupted as interruption:
        print(f"{interruption}: the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not out_of_space(error) and not isinstance(error, PermissionError):
            raise
        print(f"{DISK_FULL if out_of_space(error) else 'PermissionDenied'}: {error}", file=sys.stderr)
    return FAILED


def _run(arguments: argparse.Namespace) -> int:
    file, output = Path(arguments.file), Path(arguments.output).resolve()
    tune = read_finetune(file)
    if arguments.cpu:
        resources = tune.spec.resources.model_copy(update={"gpus": 0})
        tune = tune.model_copy(update={"spec": tune.spec.model_copy(update={"resources": resources})})
    refuse_missing_hardware(tune)
    given = _given(arguments.data)
    base = _folder(arguments.base_model) if arguments.base_model else None
    with alone_in(output) as scratch:
        train = rows_of(tune, "train", given, file, scratch)
        evaluation = rows_of(tune, "evaluation", given, file, scratch)
        refuse_cluster_only_model(tune, base)
        return _train(run_spec(tune, output), base, train, evaluation, scratch)


def _train(
    run: RunSpec, base: Path | None, train: list[DataFile] | None, evaluation: list[DataFile] | None, scratch: Path
) -> int:
    from finetune_trainer import prepare as preparing
    from finetune_trainer.command import terminal
    from finetune_trainer.interruption import Sigterm
    from finetune_trainer.storage.store import Store

    _use_own_hub_token(run)
    quiet_libraries()
    with interrupt_as_sigterm(), terminal.Bar() as bar:
        Sigterm()
        store = Store(run.storage, wait_seconds=WAIT_SECONDS)
        prepared = preparing.prepare(run, store, scratch / "prepare", preparing.Here(base, train, evaluation))
        run = run.model_copy(update={"stage": "train", "prepared": prepared})
        result = _reused(prepared)
        if result is None:
            from finetune_trainer.train import train as train_stage

            result = train_stage(run, store, scratch / "train", bar)
            assert result, "one process is the first one"
        made = _exported(run, store, result, scratch)
    print(terminal.summary(run, result, made))
    return DONE


def _exported(run: RunSpec, store: Store, result: TrainResult, scratch: Path) -> list[ExportStatus]:
    """The models that output asks for. Nothing is pushed to a hub from here: that is for `hf upload`."""
    if not run.spec.output.exports or result.adapter.gate_passed is False:
        return []
    from finetune_trainer.export import models

    run = run.model_copy(update={"stage": "export", "trained": result})
    return list(models(run, store, scratch / "export").values())


def _reused(prepared: PrepareResult) -> TrainResult | None:
    found = prepared.reused
    return TrainResult(adapter=found.adapter, evaluation=found.evaluation) if found else None


def run_spec(tune: FineTune, output: Path) -> RunSpec:
    """What the operator would hand to the Jobs, with a folder in the bucket's place."""
    storage = Storage(
        uri=f"file://{output}",
        endpoint=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "",
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "",
    )
    return RunSpec(
        stage="prepare",
        namespace=tune.metadata.namespace,
        name=tune.metadata.name,
        job="local",
        spec=tune.spec,
        storage=storage,
        trainer_image=f"finetune-operator {version('finetune-operator')}",
        tracking=tune.spec.tracking,
    )


def refuse_missing_hardware(tune: FineTune) -> None:
    """Never train on the CPU by accident, nor with fewer processes than were asked for."""
    resources = tune.spec.resources
    if resources.gpus == 0 and resources.nodes == 1:
        return
    if resources.nodes > 1 or resources.gpus > 1:
        raise BadFile(
            f"resources asks for {resources.nodes} nodes with {resources.gpus} GPUs, finetune run trains in one process: "
            "set resources.nodes: 1 and resources.gpus: 1; training.batchSize stays the effective batch"
        )
    import torch

    if not torch.cuda.is_available():
        raise BadFile(
            f"resources.gpus asks for {resources.gpus} and this machine has no GPU that torch sees: "
            "set resources.gpus: 0, or add --cpu, to train on the CPU"
        )


def rows_of(tune: FineTune, role: str, given: dict[str, Path], file: Path, scratch: Path) -> list[DataFile] | None:
    """The rows that are here: named with --data, or in a ConfigMap of the same file. None: to be fetched, or none."""
    source = tune.spec.dataset.train if role == "train" else tune.spec.dataset.evaluation
    if path := given.get(role):
        if source is None:
            raise BadFile(f"--data {role}=: the FineTune has no dataset.{role} that this could stand for; add one")
        if not path.exists():
            raise BadFile(f"--data {role}={path}: there is no such file or folder")
        return files_at(path)
    if source is None:
        return None
    if source.config_map and (here := config_map_file(file, source.config_map, scratch / role)):
        return [here]
    refuse_cluster_only_rows(source, role)
    return None


def refuse_cluster_only_rows(source: DatasetSource, role: str) -> None:
    if source.s3:
        refuse_unknown_bucket(f"dataset.{role}: {source.s3.uri}", f"--data {role}=FILE")
    if source.config_map:
        what = f"ConfigMap {source.config_map.name}"
    elif source.persistent_volume_claim:
        what = f"volume {source.persistent_volume_claim.claim_name}"
    else:
        return
    raise BadFile(f"dataset.{role}: {what} is in a cluster, not here: name the rows with --data {role}=FILE")


def refuse_cluster_only_model(tune: FineTune, base: Path | None) -> None:
    if base is not None:
        return
    if bucket := tune.spec.base_model.s3:
        refuse_unknown_bucket(f"baseModel: {bucket.uri}", "--base-model DIR")
    if volume := tune.spec.base_model.persistent_volume_claim:
        raise BadFile(
            f"baseModel: volume {volume.claim_name} is in a cluster, not here: name the model's folder with "
            "--base-model DIR"
        )


def refuse_unknown_bucket(what: str, instead: str) -> None:
    """An s3:// address says nothing of its server: without a word about that, it would be looked for at AWS."""
    if not any(os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID")):
        raise BadFile(
            f"{what} cannot be reached: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL when it is "
            f"not at AWS; or name what is here with {instead}"
        )


@contextmanager
def alone_in(output: Path) -> Iterator[Path]:
    """A scratch folder inside the output, which one run at a time may use."""
    scratch = output / ".work"
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115  # held until the end
    except OSError as error:
        raise BadFile(f"--output {output}: {error.strerror}; name a folder that can be written to") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadFile(f"{output} is used by another finetune run: wait for it, or name another --output") from error
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _given(arguments: list[str]) -> dict[str, Path]:
    """{role: path} of --data [ROLE=]PATH."""
    given: dict[str, Path] = {}
    for argument in arguments:
        role, separator, path = argument.partition("=")
        if not separator:
            role, path = "train", argument
        if role not in ROLES or role in given:
            raise BadFile(f"--data {argument}: write --data train=FILE or --data evaluation=FILE, each once")
        given[role] = Path(path)
    return given


def _folder(path: str) -> Path:
    if not (Path(path) / "config.json").is_file():
        raise BadFile(f"--base-model {path}: there is no config.json in it; name a model's folder")
    return Path(path)


@contextmanager
def interrupt_as_sigterm() -> Iterator[None]:
    """Ctrl-C is what SIGTERM is in a pod: a checkpoint after this step, then the end."""
    before = signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _use_own_hub_token(run: RunSpec) -> None:
    """The Jobs' tokens come from tokenSecretRef; here it is the user's own, of HF_TOKEN or `hf auth login`."""
    dataset = run.spec.dataset
    sources = {"BASE_MODEL": run.spec.base_model, "TRAIN": dataset.train, "EVALUATION": dataset.evaluation}
    asked = [name for name, source in sources.items() if source and source.hugging_face]
    if asked:
        from huggingface_hub import get_token

        for name in asked:
            os.environ.setdefault(f"FINETUNE_{name}_HF_TOKEN", get_token() or "")


OWN_TOKEN = "here the token is that of HF_TOKEN, or of `hf auth login`"
HINTS = {
    CUDA_OUT_OF_MEMORY: "lower training.microBatchSize (the result stays the same): the same command goes on from its "
    "checkpoint",
    DISK_FULL: "here it is the disk of --output: what is finished stays there, and the same command goes on from it",
    BASE_MODEL_GATED: OWN_TOKEN,
    HUB_UNAUTHORIZED: OWN_TOKEN,
    STORAGE_UNAUTHORIZED: "here they are in the environment",
    STORAGE_UNAVAILABLE: "here the endpoint is in AWS_ENDPOINT_URL",
}


def _hint(failure: RunFailure) -> str:
    """What is different here from the cluster that the message speaks of."""
    return f"; {HINTS[failure.reason]}" if failure.reason in HINTS else ""
