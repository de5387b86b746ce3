"""Merging tiny real models: full weights and NF4, every method that can be merged, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer import merge as merging
from finetune_trainer.digest import hash_tree, hex_of, tree_digest
from finetune_trainer.failures import RunFailure
from finetune_trainer.merge import Agreement, combine, load_as_trained, main, output_dtype
from finetune_trainer.mergespec import MergeResult, MergeSpec
from finetune_trainer.runspec import Storage
from finetune_trainer.storage.store import Store

DIGEST = "sha256:" + "ab" * 32
PROMPT = "alpha beta gamma one two three"


def spec(**changes: Any) -> MergeSpec:
    values: dict[str, Any] = {
        "name": "bot",
        "storage": Storage(uri="s3://finetune"),
        "base_uri": "s3://finetune/base",
        "adapter_uri": "s3://finetune/adapter",
        "adapter_digest": DIGEST,
        "precision": "FP32",
        "prompts": [PROMPT, "delta two"],
        **changes,
    }
    return MergeSpec(**values)


def make_adapter(base: Path, folder: Path, manifest: dict[str, Any], scale: float = 0.05, **options: Any) -> Path:
    """An adapter on the base as it is loaded in training, its weights random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = options.pop("config", None) or LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **options)
    tuned = get_peft_model(load_as_trained(base, manifest, "float32", False), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "ia3" in name:
            parameter.data = parameter.data + torch.randn_like(parameter) * scale
    tuned.save_pretrained(folder)
    return folder


def logits(model: Any, base: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return found


@pytest.mark.parametrize("kind", ["None", "NF4", "INT8"])
def test_merged_logits_are_those_of_the_mounted_adapter(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    manifest = {"quantization": kind, "doubleQuant": True}
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", manifest)
    output = tmp_path / "merged"
    result = combine(spec(), tiny_llama, adapter, manifest, output)
    mounted = PeftModel.from_pretrained(load_as_trained(tiny_llama, manifest, "float32", False), str(adapter))
    plain = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    torch.testing.assert_close(logits(plain, tiny_llama), logits(mounted, tiny_llama), atol=1e-4, rtol=1e-4)
    assert result.logprob_delta is not None and result.logprob_delta > 0.001
    assert result.logit_difference is not None and result.logit_difference <= 1e-4
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config, "a plain model"
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in output.iterdir()}
    assert not list(output.glob("*.bin"))


def test_a_qlora_adapter_meets_the_weights_that_it_was_trained_on(tiny_llama: Path) -> None:
    original = load_as_trained(tiny_llama, {"quantization": "None"}, "float32", False)
    as_trained = load_as_trained(tiny_llama, {"quantization": "NF4"}, "float32", False)
    difference = (logits(original, tiny_llama) - logits(as_trained, tiny_llama)).abs().mean()
    assert 0 < difference < logits(original, tiny_llama).std()


def test_bfloat16_is_within_its_tolerance_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    manifest = {"quantization": "None"}
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", manifest, scale=0.2)
    result = combine(spec(precision="BF16"), tiny_llama, adapter, manifest, tmp_path / "merged")
    assert result.dtype == "bfloat16" and result.tolerance == 0.1
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
def test_what_cannot_be_mounted_in_vllm_can_be_merged(
    tiny_llama: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    if "modules_to_save" in options:
        options = {**options, "exclude_modules": ["lm_head"]}
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", {}, **options)
    result = combine(spec(), tiny_llama, adapter, {}, tmp_path / "merged")
    assert result.logprob_delta is not None and result.logprob_delta > 0


def test_ia3_can_be_merged_into_dequantised_weights(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    manifest = {"quantization": "NF4"}
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", manifest, scale=0.3, config=config, task_type="CAUSAL_LM")
    assert combine(spec(), tiny_llama, adapter, manifest, tmp_path / "merged").logprob_delta


def test_prompt_methods_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(RunFailure, match="bot: PREFIX_TUNING adds tokens and changes no weights"):
        combine(spec(), tiny_llama, tmp_path / "adapter", {}, tmp_path / "merged")


def test_an_adapter_without_effect_is_refused_and_nothing_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", {}, scale=0.0)
    with pytest.raises(RunFailure, match=r"differ from the base model's by 0, less than spec.probe.minLogprobDelta"):
        combine(spec(), tiny_llama, adapter, {}, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "agreement, words",
    [
        (Agreement(logits=0.5, effect=1.0, rounding=0.0), "merged logits differ from mounted ones"),
        (Agreement(logits=0.0, effect=0.0001, rounding=0.0), "less than spec.probe.minLogprobDelta"),
        (Agreement(logits=0.05, effect=0.01, rounding=0.009), "rounded away"),
        (Agreement(logits=0.05, effect=0.5, rounding=0.01), ""),
    ],
)
def test_what_makes_a_merged_model_wrong(agreement: Agreement, words: str) -> None:
    refusal = agreement.refusal("bfloat16", 0.001)
    assert words in refusal and bool(words) == bool(refusal)


def test_a_gpu_is_given_bfloat16_and_an_old_cpu_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "cpu_has_bf16", lambda: False)
    assert output_dtype(spec(precision="Auto", gpus=1)) == "bfloat16"
    assert output_dtype(spec(precision="Auto", gpus=0)) == "float32"


def test_the_whole_step_from_the_store_to_the_termination_message(
    tiny_llama: Path, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    storage = Storage(uri="s3://finetune/merge", endpoint=endpoint)
    store = Store(storage)
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", {"quantization": "NF4"})
    base, digest = (tree_digest(hash_tree(folder)) for folder in (tiny_llama, adapter))
    store.upload_tree(tiny_llama, f"models/{hex_of(base)}")
    lineage = {"quantization": "NF4", "baseModel": {"digest": base}}
    store.upload_tree(adapter, "adapter", lineage)
    asked = spec(
        storage=storage,
        base_uri=store.uri(f"models/{hex_of(base)}"),
        base_digest=base,
        adapter_uri=store.uri("adapter"),
        adapter_digest=digest,
    )
    file, message, output = tmp_path / "merge.json", tmp_path / "termination-log", tmp_path / "models/merged"
    file.write_text(asked.model_dump_json(by_alias=True))
    message.touch()
    monkeypatch.setattr(merging, "TERMINATION_LOG", message)
    arguments = ["--spec", str(file), "--output", str(output)]
    assert main(arguments) == 0
    result = MergeResult.model_validate_json(message.read_text())
    assert result.adapter_digest == digest and result.failure is None
    assert [path.name for path in output.parent.iterdir()] == ["merged"], "base and adapter are gone from the disk"
    # The init step of a pod that is restarted finds its work done.
    store.delete("adapter")
    assert main(arguments) == 0
    # Another digest is not done, and its absence is a failure with a reason.
    file.write_text(asked.model_copy(update={"adapter_digest": DIGEST}).model_dump_json(by_alias=True))
    assert main(arguments) == 1
    failed = MergeResult.model_validate_json(message.read_text())
    assert failed.failure is not None and failed.failure.reason == "DownloadFailed"


def test_an_adapter_of_another_base_model_is_refused() -> None:
    with pytest.raises(RunFailure, match="bot was trained on base model sha256:11"):
        merging.refuse_foreign(spec(base_digest=DIGEST), {"baseModel": {"digest": "sha256:11"}})
