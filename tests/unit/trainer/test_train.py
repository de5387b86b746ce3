"""The train stage, end to end on tiny models against a real MinIO."""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.digest import canonical_json, hash_tree, manifest_of, sha256_hex
from finetune_trainer.runspec import PrepareResult, RunSpec, Storage
from finetune_trainer.store import Store

from .tiny import finetune_spec, make_rows, write_dataset

pytestmark = pytest.mark.timeout(120)


class Bench:
    """A bucket prefix of its own with model and dataset in it, and runs against them."""

    def __init__(self, endpoint: str, model: Path, dataset: Path, work: Path, evaluation: int = 0) -> None:
        self.storage = Storage(uri=f"s3://finetune/{uuid.uuid4().hex[:8]}", endpoint=endpoint)
        self.store, self.work, self.attempts = Store(self.storage, wait_seconds=5), work, 0
        model_digest = self._upload(model, "models")
        dataset_digest = self._upload(dataset, "datasets")
        self.prepared = PrepareResult.model_validate(
            {
                "runId": "0123456789abcdef",
                "baseModel": {
                    "digest": model_digest,
                    "uri": self.store.uri(f"models/{model_digest[7:]}"),
                    "revision": "main",
                },
                "dataset": {
                    "digest": dataset_digest,
                    "uri": self.store.uri(f"datasets/{dataset_digest[7:]}"),
                    "evaluationSamples": evaluation,
                },
            }
        )

    def _upload(self, folder: Path, kind: str) -> str:
        digest = manifest_of(hash_tree(folder))["digest"]
        return self.store.upload_tree(folder, f"{kind}/{digest[7:]}")

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
        lines = self.store.get_bytes("runs/0123456789abcdef/metrics.jsonl").decode().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def steps(self) -> list[int]:
        keys = [entry.key for entry in self.store.list("runs/0123456789abcdef/checkpoints")]
        return sorted({int(key.split("step-")[1].split("/")[0]) for key in keys})


@pytest.fixture
def bench(endpoint: str, tiny_llama: Path, tmp_path: Path) -> Bench:
    dataset = write_dataset(tmp_path / "data", make_rows(24), make_rows(6, seed=1))
    return Bench(endpoint, tiny_llama, dataset, tmp_path / "work", evaluation=6)


def test_lora_learns_and_leaves_an_adapter_that_anyone_can_verify(bench: Bench, tmp_path: Path) -> None:
    result = bench.train(finetune_spec(training={"maxSteps": 20}))

    assert result.evaluation.adapter["loss"] < result.evaluation.base["loss"]
    assert bench.losses()[-1] < bench.losses()[0]
    folder = tmp_path / "adapter"
    manifest = bench.store.at(result.adapter.uri).download_tree("", folder, result.adapter.digest)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [
        {"path": str(p.relative_to(folder)), "sha256": sha256_hex(p.read_bytes()), "size": p.stat().st_size}
        for p in files
    ]
    assert result.adapter.digest == "sha256:" + sha256_hex(canonical_json(listed))
    assert {file.name for file in files} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert manifest["baseModel"]["digest"] == bench.prepared.base_model.digest
    assert manifest["prompts"]
    assert result.adapter.rank == 4 and result.adapter.trainable_parameters > 0


QLORA = {"type": "QLoRA", "lora": {"rank": 4, "alpha": 8}}


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ({"type": "LoRA"}, "adamw_torch"),
        (QLORA, "adamw_torch"),
        (QLORA, "paged_adamw_8bit"),
        ({"type": "LoRA"}, "adafactor"),
    ],
)
def test_a_resumed_run_has_bitwise_the_losses_and_the_adapter_of_an_uninterrupted_one(
    bench: Bench, method: dict[str, Any], optimizer: str
) -> None:
    spec = finetune_spec(method=method, training={"optimizer": optimizer}, checkpoint={"every": 3, "keep": 9})
    whole = bench.train(spec)
    losses = bench.losses()
    bench.store.delete("runs/0123456789abcdef/result.json")
    for step in bench.steps():
        if step > 3:
            bench.store.delete(f"runs/0123456789abcdef/checkpoints/step-{step}")
    assert bench.steps() == [3]
    resumed = bench.train(spec)
    assert resumed.resumed_from_step == 3
    assert bench.losses() == losses
    assert resumed.adapter.digest == whole.adapter.digest
