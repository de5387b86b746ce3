"""Runs one stage of a run inside its Job: read the spec, do the work, leave one Result wherever the operator looks.

A stage is a module with `main(spec: RunSpec) -> Result | None`: of several processes only the first has one. It raises
RunFailure when the run cannot go on, and Interrupted once it has saved a checkpoint on SIGTERM. The Result becomes the
container's termination message and is posted to the operator; whichever arrives first counts.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from pathlib import Path

from pydantic import ValidationError

from finetune_trainer import failures, launch
from finetune_trainer.failures import RunFailure, out_of_space
from finetune_trainer.runspec import Failure, Result, RunSpec

log = logging.getLogger(__name__)

DONE, FAILED, INTERRUPTED = launch.DONE, launch.FAILED, launch.INTERRUPTED
TERMINATION_LOG = "/dev/termination-log"


class Interrupted(Exception):
    """SIGTERM came and the checkpoint is saved: neither success nor failure."""


def run_stage(stage: str, spec_path: str) -> int:
    """Run `stage` with the spec in a file; returns the exit code."""
    logging.basicConfig(
        level=logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING,
        stream=sys.stdout,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    quiet_libraries()
    try:
        spec = RunSpec.model_validate_json(Path(spec_path).read_bytes())
    except (OSError, ValidationError) as error:
        failure = Failure(reason=failures.INTERNAL_ERROR, message=f"the run spec {spec_path} cannot be read: {error}")
        return finish(Result(stage=stage, job="", failure=failure), None)
    try:
        if stage == "train" and (places := launch.places(spec, os.environ)):
            if len(places) > 1:
                return launch.run_node(spec, launch.train_command(spec_path), places, termination_log())
            os.environ.update(places[0])
        result = import_module(f"finetune_trainer.{stage}").main(spec)
    except Interrupted as interruption:
        log.info("%s", interruption)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  # becomes the Result, whatever it is
        known = failure_of(error)
        result = Result.failed(spec, known.reason, known.message)
    return finish(result, spec) if result is not None else DONE


def failure_of(error: Exception) -> RunFailure:
    """What a stage failed of; what nobody foresaw is in the log with its traceback."""
    if isinstance(error, RunFailure):
        return error
    if out_of_space(error):
        return RunFailure(failures.DISK_FULL, f"no space left on the pod's volumes: {error}")
    log.error("unforeseen", exc_info=error)
    return RunFailure(failures.INTERNAL_ERROR, f"{type(error).__name__}: {error} (traceback in the pod's log)")


def termination_log() -> Path:
    """The file whose content the kubelet keeps: the Result."""
    return Path(os.environ.get("TERMINATION_LOG", TERMINATION_LOG))


def quiet_libraries() -> None:
    """Leave the log to what we say."""
    for chatty in ("httpx", "httpx2", "urllib3", "huggingface_hub", "filelock", "fsspec", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def finish(result: Result, spec: RunSpec | None) -> int:
    """Leave the Result in the termination message and at the operator; returns the exit code that belongs to it."""
    if result.failure:
        log.error("%s: %s", result.failure.reason, result.failure.message)
    path = termination_log()
    try:
        path.write_bytes(result.wire())
    except OSError as error:
        log.warning("the termination message %s cannot be written: %s", path, error)
    if spec is not None and spec.report_url:
        from finetune_trainer.report import Reporter

        Reporter(spec).result(result)
    return FAILED if result.failure else DONE
