"""What `finetune run` shows: a bar while it trains, and what came out of it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from finetune_operator.api.finetunestatus import EvaluationStatus, ExportStatus, GateStatus, ProgressStatus
from finetune_trainer.digest import short
from finetune_trainer.results.modelcard import loaded_with
from finetune_trainer.runspec import RunSpec, TrainResult

INTERVAL = 0.2


class Bar:
    """A progress bar on a terminal, log lines elsewhere; a Listener of the training."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.shown = self.stream.isatty()
        self._lines = _AboveTheBar(self.stream)
        self._bar: Any = None
        self._last = -INTERVAL

    def begins(self, micro_batch: int) -> None:
        """The log says so already."""

    def due(self) -> bool:
        return self.shown and time.monotonic() - self._last >= INTERVAL

    def progress(self, progress: ProgressStatus) -> bool:
        self._last = time.monotonic()
        if self._bar is None:
            logging.getLogger("finetune_trainer.progress").setLevel(logging.WARNING)  # the bar says the same
            self._bar = tqdm(
                total=progress.total_steps, initial=progress.step, file=self.stream, unit="step", leave=False
            )
        self._bar.n = progress.step
        loss = f"loss {progress.loss:.4f}" if progress.loss is not None else ""
        self._bar.set_postfix_str(f"{loss}, {progress.tokens_per_second or 0:.0f} tokens/s")
        return True

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self._lines)
        logging.getLogger("finetune_trainer").setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self._lines)
        if self._bar is not None:
            self._bar.close()


class _AboveTheBar(logging.Handler):
    """Log lines that leave the bar where it is."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


def summary(run: RunSpec, result: TrainResult, exports: Sequence[ExportStatus] = ()) -> str:
    """The end of a run: how good the adapter is, what it is, where it lies and how to use it."""
    adapter, evaluation = result.adapter, result.evaluation
    lines = [*evaluation_table(evaluation), ""] if evaluation and evaluation.adapter else []
    lines += [gate_line(gate) for gate in evaluation.gates] if evaluation else []
    folder = adapter.uri.removeprefix("file://")
    size = f"{adapter.size_bytes / 1e6:.1f} MB, {adapter.trainable_parameters:,} parameters trained"
    how = f"run {adapter.run_id}, trained before" if not result.steps else f"run {adapter.run_id}, {result.steps} steps"
    base = (run.prepared.base_model.uri if run.prepared else "").removeprefix("file://")
    kind, options = loaded_with(run.spec)
    return "\n".join(
        [
            *lines,
            f"adapter  {short(adapter.digest)} ({size}; {how})",
            f"digest   {adapter.digest}",
            f"folder   {folder}",
            f"report   {run.storage.uri.removeprefix('file://')}/runs/{adapter.run_id}/report.html",
            *(
                f"{one.name.lower():<8} {one.url}{f' ({one.message})' if one.message else ''}"
                for one in result.tracking
            ),
            *(f"{export.type.lower():<8} {export.uri.removeprefix('file://')}" for export in exports),
            "",
            "from peft import PeftModel",
            f"from transformers import {kind}",
            f'model = {kind}.from_pretrained("{base}"{options})',
            f'model = PeftModel.from_pretrained(model, "{folder}")',
        ]
    )


def evaluation_table(evaluation: EvaluationStatus) -> list[str]:
    """Base model against adapter, one metric a line."""
    width = max(18, *(len(name) + 2 for name in evaluation.adapter))
    what = "on held-out rows" if any("/" not in name for name in evaluation.adapter) else "on tasks"
    head = f"{what:<{width}}{'base':>10}{'adapter':>10}"
    rows = [
        f"{name:<{width}}{_number(evaluation.base.get(name)):>10}{_number(value):>10}"
        for name, value in evaluation.adapter.items()
    ]
    return [head, *rows]


def gate_line(gate: GateStatus) -> str:
    verdict = "passed" if gate.passed else "NOT PASSED"
    return f"gate     {gate.metric}: {verdict}{' (' + gate.message + ')' if gate.message else ''}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
