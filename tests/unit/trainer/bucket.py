"""A place of its own in the session's MinIO, with what the stages of a run find and leave there."""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from finetune_trainer.digest import hash_tree, hex_of, tree_digest
from finetune_trainer.runspec import PrepareResult, RunSpec, Storage
from finetune_trainer.storage.store import Store

RUN_ID = "0123456789abcdef"
RUN = f"runs/{RUN_ID}"


class Bucket:
    """A base model, and a dataset where it is needed, as prepare leaves them."""

    def __init__(self, endpoint: str, model: Path, dataset: Path | None = None, evaluation: int = 0) -> None:
        self.storage = Storage(uri=f"s3://finetune/{uuid.uuid4().hex[:8]}", endpoint=endpoint)
        self.store = Store(self.storage, wait_seconds=5)
        rows = self.upload(dataset, "datasets") if dataset else {"digest": "sha256:" + "b" * 64}
        self.prepared = PrepareResult.model_validate(
            {
                "runId": RUN_ID,
                "baseModel": {**self.upload(model, "models"), "revision": "main"},
                "dataset": {**rows, "evaluationSamples": evaluation},
            }
        )

    def upload(self, folder: Path, kind: str, about: dict[str, Any] | None = None) -> dict[str, str]:
        """Digest and address of what is in the bucket then; `about`: said in its manifest."""
        digest = tree_digest(hash_tree(folder))
        prefix = f"{kind}/{hex_of(digest)}"
        self.store.upload_tree(folder, prefix, about)
        return {"digest": digest, "uri": self.store.uri(prefix)}


class Bench(Bucket):
    """Runs of the train stage, and what they leave."""

    def __init__(self, endpoint: str, model: Path, dataset: Path, work: Path, evaluation: int = 0) -> None:
        super().__init__(endpoint, model, dataset, evaluation)
        self.work, self.attempts = work, 0

    def run_spec(self, spec: Any, **fields: Any) -> RunSpec:
        self.attempts += 1
        return RunSpec(
            stage="train", namespace="demo", name="tiny", job=f"tiny-{self.attempts}", attempt=self.attempts, spec=spec,
            storage=self.storage, prepared=self.prepared, **fields,
        )  # fmt: skip

    def train(self, spec: Any, **fields: Any) -> Any:
        from finetune_trainer.train import train

        work = self.work / f"attempt-{self.attempts}"
        try:
            return train(self.run_spec(spec, **fields), self.store, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def losses(self) -> list[float]:
        lines = self.store.get_bytes(f"{RUN}/metrics.jsonl").decode().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def steps(self) -> list[int]:
        """Of the checkpoints."""
        keys = [entry.key for entry in self.store.list(f"{RUN}/checkpoints")]
        return sorted({int(key.split("step-")[1].split("/")[0]) for key in keys})
