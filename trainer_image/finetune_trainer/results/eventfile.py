"""TensorBoard's event file: the curves of a run, written by tensorboardX, which needs neither TensorBoard nor gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune_operator.api.finetunestatus import EvaluationStatus
from finetune_trainer.results import scalars


def event_file(metrics: Sequence[Mapping[str, Any]], evaluation: EvaluationStatus | None) -> bytes:
    """The whole file: a scalar per step and metric, and the evaluation of adapter and base model at the last step."""
    from tensorboardX import SummaryWriter  # half a second, when the run is over

    with TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for line in metrics:
                _add(writer, line, scalars.of_step(line))
            if metrics:
                _add(writer, metrics[-1], scalars.of_evaluation(evaluation))
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


def _add(writer: Any, line: Mapping[str, Any], values: Mapping[str, float]) -> None:
    for tag, value in values.items():
        writer.add_scalar(tag, value, line["step"], walltime=line.get("time"))
