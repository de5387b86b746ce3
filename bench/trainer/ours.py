"""Our trainer as a Job runs it: prepare once, then `python -m finetune_trainer train` from a bucket in a real MinIO."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.trainer.workload import MAX_LENGTH, Recipe
from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.runspec import PrepareResult, Result, RunSpec, Storage
from finetune_trainer.storage.store import Store


def finetune(recipe: Recipe, storage: Storage, precision: str) -> FineTuneSpec:
    """The FineTune of the recipe. Not packed: with packing a batch counts rows of several samples, which no contestant
    could be given."""
    return FineTuneSpec.model_validate(
        {
            "baseModel": {"s3": {"uri": f"{storage.uri}/base"}},
            "dataset": {"train": {"s3": {"uri": f"{storage.uri}/train.jsonl"}}},
            "method": {
                "type": "LoRA",
                "lora": {"rank": recipe.rank, "alpha": recipe.alpha, "dropout": recipe.dropout},
            },
            "training": {
                "maxSteps": recipe.steps,
                "batchSize": recipe.batch_size,
                "learningRate": recipe.learning_rate,
                "scheduler": "Constant",
                "maxLength": MAX_LENGTH,
                "packing": "Disabled",
                "precision": precision,
                "seed": recipe.seed,
            },
            "resources": {"gpus": 0},
        }
    )


class Ours:
    """A bucket with model and data in it, and runs from there."""

    def __init__(self, endpoint: str, model: Path, data: Path, recipe: Recipe, work: Path, precision: str) -> None:
        self.storage = Storage(uri="s3://finetune/bench", endpoint=endpoint)
        self.store, self.work, self.recipe = Store(self.storage), work, recipe
        for file in model.iterdir():
            self.store.put_file(f"base/{file.name}", file)
        self.store.put_file("train.jsonl", data)
        self.spec = finetune(recipe, self.storage, precision)
        self.prepared = self._prepare()

    def _run_spec(self, stage: str, **fields: Any) -> RunSpec:
        return RunSpec.model_validate(
            {"stage": stage, "namespace": "bench", "name": "bench", "job": f"bench-{stage}", "spec": self.spec,
             "storage": self.storage, **fields}
        )  # fmt: skip

    def _write(self, run: RunSpec) -> list[str]:
        file = self.work / f"{run.stage}.json"
        file.write_text(run.model_dump_json(by_alias=True, exclude_none=True))
        return [sys.executable, "-m", "finetune_trainer", run.stage, "--spec", str(file)]

    def environment(self) -> dict[str, str]:
        return {"FINETUNE_WORK": str(self.work / "job"), "TERMINATION_LOG": str(self.work / "result.json")}

    def _prepare(self) -> PrepareResult:
        command = self._write(self._run_spec("prepare"))
        subprocess.run(command, env={**os.environ, **self.environment()}, stdout=subprocess.DEVNULL, check=True)
        prepared = Result.model_validate_json((self.work / "result.json").read_bytes()).prepared
        assert prepared
        return prepared

    def command(self) -> list[str]:
        """The command of a fresh attempt: nothing is left on the disk or in the bucket of the one before."""
        shutil.rmtree(self.work / "job", ignore_errors=True)
        self.store.delete(f"runs/{self.prepared.run_id}")
        self.store.delete("adapters")
        return self._write(self._run_spec("train", prepared=self.prepared))

    def losses(self) -> list[float]:
        lines = self.store.get_bytes(f"runs/{self.prepared.run_id}/metrics.jsonl").decode().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def tokens(self) -> list[int]:
        """Tokens up to and with each step."""
        lines = self.store.get_bytes(f"runs/{self.prepared.run_id}/metrics.jsonl").decode().splitlines()
        return [json.loads(line)["tokens"] for line in lines]
