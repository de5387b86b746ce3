"""What report.html tells of a run: gathered while it trains, so that a run that fails late is told too."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_operator.api.finetunestatus import AdapterStatus, EvaluationStatus, TrackerStatus
from finetune_trainer.runspec import RunSpec

log = logging.getLogger(__name__)


@dataclass
class Story:
    """The run and everything that is known about it so far; what is empty is not shown."""

    run: RunSpec
    about: dict[str, Any] = field(default_factory=dict)  # dataset.json
    preview: list[dict[str, Any]] = field(default_factory=list)  # preview.json: pieces of one sample
    metrics: list[dict[str, Any]] = field(default_factory=list)  # one entry per step
    total_steps: int = 0
    resumed_from: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)  # of this attempt, as in run.json
    evaluation: EvaluationStatus | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)  # one entry per metric, as in tasks.json
    answers: list[dict[str, str]] = field(default_factory=list)  # prompt, base, adapter
    adapter: AdapterStatus | None = None
    tracking: list[TrackerStatus] = field(default_factory=list)
    failure: str = ""

    def read_dataset(self, folder: Path) -> None:
        """Take what prepare left beside the rows."""
        self.about = _read(folder / "dataset.json", {})
        self.preview = _read(folder / "preview.json", [])


def _read(path: Path, otherwise: Any) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        log.warning("report: %s cannot be read (%s); it is left out", path.name, error)
        return otherwise
