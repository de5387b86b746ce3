"""The export stage on a tiny model against a real MinIO: a merged model that is verified, whole, and made once."""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFReader

from finetune_trainer import merge
from finetune_trainer.data.batches import padded
from finetune_trainer.digest import hash_tree, hex_of, tree_digest
from finetune_trainer.export import export, merged_precision
from finetune_trainer.failures import RunFailure
from finetune_trainer.results.adapter import write_adapter
from finetune_trainer.runspec import PrepareResult, RunSpec, Storage, TrainResult
from finetune_trainer.storage.store import Store

from .bucket import Bucket
from .small_run import Setup, run_spec
from .test_merge import make_adapter
from .tiny import finetune_spec


class Trained(Bucket):
    """With an adapter as train leaves it."""

    def __init__(
        self, endpoint: str, model: Path, adapter: Path, quantization: str = "None", objective: str = "SFT"
    ) -> None:
        super().__init__(endpoint, model)
        self.objective, self.base = objective, self.prepared.base_model.digest
        lineage = {"quantization": quantization, "baseModel": {"digest": self.base}, "prompts": ["alpha beta gamma"]}
        self.trained = TrainResult.model_validate({"adapter": self.upload(adapter, "adapters", lineage)})
        self.adapter = self.trained.adapter.digest

    def run(self, **output: Any) -> RunSpec:
        return RunSpec(
            stage="export", namespace="demo", name="tiny", job="tiny-export-1", storage=self.storage,
            spec=finetune_spec(output=output, objective={"type": self.objective}),
            prepared=self.prepared, trained=self.trained,
        )  # fmt: skip


@pytest.fixture
def bucket(endpoint: str, tiny_llama: Path, tmp_path: Path) -> Trained:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", {"quantization": "None"})
    return Trained(endpoint, tiny_llama, adapter)


def test_a_merged_model_is_verified_uploaded_whole_and_made_only_once(bucket: Trained, tmp_path: Path) -> None:
    (made,) = export(bucket.run(exports=["Merged"]), bucket.store, tmp_path / "work")
    assert made.type == "Merged" and made.uri == bucket.store.uri(f"merged/{hex_of(made.digest)}")
    assert "standard deviations (at most 0.0001 in float32)" in made.message
    folder = tmp_path / "got"
    manifest = bucket.store.at(made.uri).download_tree("", folder, made.digest)
    assert tree_digest(hash_tree(folder)) == made.digest
    assert sum(file.stat().st_size for file in folder.iterdir()) == made.size_bytes
    assert manifest["adapter"]["digest"] == bucket.adapter and manifest["baseModel"]["digest"] == bucket.base
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in folder.iterdir()}
    card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert card["library_name"] == "transformers"

    # Without its base model in the bucket nothing could be merged again.
    bucket.store.delete(f"models/{hex_of(bucket.base)}/model.safetensors")
    again = export(bucket.run(exports=["Merged"], mergedPrecision="FP32"), bucket.store, tmp_path / "again")
    assert again == [made]


@pytest.mark.parametrize("quantization", ["None", "NF4"])
def test_a_merged_reward_model_has_the_scores_of_the_trained_one(
    endpoint: str, quantization: str, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    method = {"type": "QLoRA" if quantization == "NF4" else "LoRA", "lora": {"rank": 4, "alpha": 8}}
    spec = finetune_spec(objective={"type": "Reward"}, method=method)
    trained = Setup(tmp_path / "run", tiny_llama, spec)
    trained.run(2)
    write_adapter(trained.model, run_spec(spec), tmp_path / "adapter", trained.initial)
    batch = padded([trained.rows[index] for index in range(3)])
    trained.model.eval()
    with torch.no_grad():
        scores = trained.objective.scores(trained.model, batch)

    bucket = Trained(endpoint, tiny_llama, tmp_path / "adapter", quantization, "Reward")
    (made,) = export(bucket.run(exports=["Merged"]), bucket.store, tmp_path / "work")
    assert made.message.startswith("its scores differ from the mounted adapter's by")
    folder = tmp_path / "got"
    bucket.store.at(made.uri).download_tree("", folder, made.digest)
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        theirs = merged(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    assert torch.allclose(scores, theirs, atol=1e-4), (scores - theirs).abs().max()
    assert "AutoModelForSequenceClassification.from_pretrained" in (folder / "README.md").read_text()


def test_a_gguf_file_is_verified_by_llama_cpp_and_made_from_the_same_merge(
    bucket: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: list[Path] = []
    combine = merge.combine

    def counted(*arguments: Any) -> Any:
        merges.append(arguments[-1])
        return combine(*arguments)

    monkeypatch.setattr(merge, "combine", counted)
    made = export(bucket.run(exports=["Merged", "GGUF"]), bucket.store, tmp_path / "work")
    assert [one.type for one in made] == ["Merged", "GGUF"] and len(merges) == 1
    gguf = made[1]
    assert gguf.uri == bucket.store.uri(f"gguf/{hex_of(gguf.digest)}")
    assert "in llama.cpp its logits differ from the merged model's by" in gguf.message
    assert gguf.message.endswith("texts have the same tokens")  # and the chat template writes the same
    folder = tmp_path / "got"
    manifest = bucket.store.at(gguf.uri).download_tree("", folder, gguf.digest)
    assert {path.name for path in folder.iterdir()} == {"tiny-F32.gguf", "README.md"}
    assert manifest["adapter"]["digest"] == bucket.adapter
    assert manifest["verification"]["ggufLogitDifference"] < 0.001
    fields = GGUFReader(folder / "tiny-F32.gguf").fields
    assert fields["tokenizer.chat_template"].contents().startswith("{% for m in messages %}")
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2

    assert export(bucket.run(exports=["GGUF"]), bucket.store, tmp_path / "again") == [gguf]
    assert len(merges) == 1


def test_half_a_merged_model_in_the_bucket_is_made_again(
    bucket: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = bucket.store.put_file

    def cut_off(key: str, path: Path) -> None:
        if key.endswith("model.safetensors"):
            raise RunFailure("UploadFailed", "the connection is gone")
        put_file(key, path)

    monkeypatch.setattr(bucket.store, "put_file", cut_off)
    with pytest.raises(RunFailure, match="connection is gone"):
        export(bucket.run(exports=["Merged"]), bucket.store, tmp_path / "work")
    keys = [entry.key for entry in bucket.store.list("merged")]
    assert not [key for key in keys if key.endswith(("manifest.json", "FP32.json"))]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "work")
    (made,) = export(bucket.run(exports=["Merged"]), bucket.store, tmp_path / "work")
    assert bucket.store.verify_tree(f"merged/{hex_of(made.digest)}")


@pytest.mark.parametrize(
    ("dtype", "asked", "precision"),
    [
        ("float32", "Auto", "FP32"),
        ("float16", "Auto", "FP16"),
        ("bfloat16", "Auto", "BF16"),
        (None, "Auto", "BF16"),
        ("float32", "BF16", "BF16"),
    ],
)
def test_auto_is_the_type_of_the_base_model(endpoint: str, dtype: str | None, asked: str, precision: str) -> None:
    storage = Storage(uri=f"s3://finetune/{uuid.uuid4().hex[:8]}", endpoint=endpoint)
    store = Store(storage)
    store.put_bytes("base/config.json", json.dumps({"dtype": dtype} if dtype else {}).encode())
    prepared = {"runId": "0", "baseModel": {"uri": store.uri("base")}, "dataset": {}}
    run = RunSpec(
        stage="export", namespace="demo", name="tiny", job="j", storage=storage,
        spec=finetune_spec(output={"exports": ["Merged"], "mergedPrecision": asked}),
        prepared=PrepareResult.model_validate(prepared),
    )  # fmt: skip
    assert merged_precision(run, store) == precision
