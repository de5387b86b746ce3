"""What is made from an adapter after training, and the page that tells of the run."""

from __future__ import annotations

import json
from typing import Any

from e2e.cases.conftest import Apply
from e2e.cases.objects import finetune
from e2e.kubectl import Kubectl
from e2e.storage import open_storage
from finetune_trainer.digest import files_of


def test_a_merged_model_is_exported_and_the_run_is_told_on_a_page(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    """Another 4 steps, and the merge: about 30 s. The GGUF file costs 3 s of that."""
    answered = {"samples": ["What colour is the light without a link?"]}
    tune = apply(finetune("merged", namespace, seed, output={"exports": ["Merged", "GGUF"]}, evaluation=answered))
    status = tune.wait_true("Complete")["status"]
    assert (status["phase"], status["reason"]) == ("Succeeded", "Exported")
    assert tune.stages() == ["export", "prepare", "train"]
    export, gguf = status["exports"]
    assert (export["type"], gguf["type"]) == ("Merged", "GGUF")
    assert "logits differ from the mounted adapter's" in export["message"]

    with open_storage(kubectl) as storage:

        def read(uri: str) -> bytes:
            bucket, _, key = uri.removeprefix("s3://").partition("/")
            response = storage.get_object(bucket_name=bucket, object_name=key)
            try:
                content: bytes = response.read()
                return content
            finally:
                response.close()
                response.release_conn()

        manifest: dict[str, Any] = json.loads(read(f"{export['uri']}/manifest.json"))
        of_gguf: dict[str, Any] = json.loads(read(f"{gguf['uri']}/manifest.json"))
        page = read(status["run"]["report"]).decode()
    assert manifest["digest"] == export["digest"]
    assert manifest["adapter"]["digest"] == status["adapter"]["digest"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.path for file in files_of(manifest)}
    assert of_gguf["digest"] == gguf["digest"] and of_gguf["adapter"] == manifest["adapter"]
    assert "in llama.cpp its logits differ from the merged model's" in gguf["message"]
    assert {file.path.rpartition(".")[2] for file in files_of(of_gguf)} == {"gguf", "md"}
    assert page.startswith("<!doctype html>")
    assert status["adapter"]["digest"] in page and answered["samples"][0] in page
