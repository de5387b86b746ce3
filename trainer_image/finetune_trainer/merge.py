"""Merges an adapter into its base model, and proves that the result is the tuned model.

    python -m finetune_trainer merge --spec merge.json --output /models/merged

A QLoRA adapter was trained on a base that had been rounded to 4 bits. Merged into the original weights it meets other
weights than it was trained on, and merged into the 4-bit weights it is rounded away (artidoro/qlora#254, peft#2105). So
the base is quantized as in training, expanded again, and the adapter is added to that: a plain model in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from finetune_trainer import failures
from finetune_trainer.evaluation.probeprompts import prompts_for
from finetune_trainer.failures import RunFailure
from finetune_trainer.mergespec import MergeResult, MergeSpec
from finetune_trainer.methods.servable import fold_refusal, gives_scores, merge_refusal
from finetune_trainer.runspec import Failure
from finetune_trainer.training.precision import cpu_has_bf16

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from finetune_trainer.storage.store import Store

log = logging.getLogger(__name__)

TERMINATION_LOG = Path("/dev/termination-log")
RECORD = "finetune-merge.json"

#: How far merged logits may be from mounted ones, as a mean and in standard deviations of the logits. bfloat16 keeps 8
#: bits of a weight: 0.0156 was measured where the deviation was 0.33, so the bound is twice what is seen. float16 keeps 11.
TOLERANCE = {"float32": 1e-4, "float16": 0.0125, "bfloat16": 0.1}
#: Merged and mounted model must be nearer to each other than this share of what the adapter changes.
ROUNDING_SHARE = 0.5
#: As in the agent's probe, the base model's likeliest tokens are compared.
LIKELIEST = 5


@dataclass(frozen=True)
class Agreement:
    """Differences over all prompts and places: `logits` in standard deviations, the others in log probability."""

    logits: float
    effect: float
    rounding: float

    def refusal(self, dtype: str, min_delta: float) -> str:
        """What is wrong with the merged model, empty when nothing is."""
        if self.logits > TOLERANCE[dtype]:
            return (
                f"merged logits differ from mounted ones by {self.logits:.2g} standard deviations, more than "
                f"{TOLERANCE[dtype]:.2g} in {dtype}: serve this adapter with mode: Mount"
            )
        if self.effect < min_delta:
            return (
                f"the merged model's log probabilities differ from the base model's by {self.effect:.2g}, less than "
                f"spec.probe.minLogprobDelta {min_delta:.2g}: train longer, or set spec.probe.prompts to the kind of "
                "prompts that this adapter was trained on"
            )
        if min_delta and self.rounding > ROUNDING_SHARE * self.effect:
            return (
                f"rounding to {dtype} changes the answers by {self.rounding:.2g}, the adapter by {self.effect:.2g}: "
                "most of it would be rounded away; serve this adapter with mode: Mount"
            )
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; returns the exit code. The result is also the container's termination message."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(
        prog="finetune merge", description="Merge an adapter into its base model, verified."
    )
    parser.add_argument("--spec", required=True, type=Path, metavar="FILE", help="a MergeSpec as JSON")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the merged model is written")
    arguments = parser.parse_args(argv)
    try:
        spec = MergeSpec.model_validate_json(arguments.spec.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        parser.error(f"--spec {arguments.spec}: {error}")
    try:
        result = merge(spec, arguments.output)
    except RunFailure as failure:
        log.error("%s: %s", failure.reason, failure.message)
        result = MergeResult(
            adapter_digest=spec.adapter_digest, failure=Failure(reason=failure.reason, message=failure.message[:2000])
        )
    line = result.model_dump_json(by_alias=True, exclude_none=True)
    if TERMINATION_LOG.exists():
        TERMINATION_LOG.write_text(line, encoding="utf-8")
    print(line)
    return 1 if result.failure is not None else 0


def merge(spec: MergeSpec, output: Path, store: Store | None = None) -> MergeResult:
    """The merged, verified model in `output`. RunFailure when it cannot be made or is not the tuned model."""
    if (done := finished(output, spec.adapter_digest)) is not None:
        log.info("%s holds the merged model already", output)
        return done
    from finetune_trainer.sources import servedbase
    from finetune_trainer.storage.store import Store

    store = store or Store(spec.storage)
    work = output.parent / "merge-work"
    log.info("fetching adapter %s", spec.adapter_uri)
    adapter = work / "adapter"
    manifest = store.at(spec.adapter_uri).download_tree("", adapter, spec.adapter_digest)
    refuse_foreign(spec, manifest)
    trained_on = (manifest.get("baseModel") or {}).get("digest", "")
    base = servedbase.fetch(store, spec.base_uri, spec.base_digest or trained_on, work / "base").path
    result = combine(spec, base, adapter, manifest, output)
    shutil.rmtree(work)
    return result


def finished(output: Path, digest: str) -> MergeResult | None:
    """What an earlier run of this init step left in the pod's volume."""
    try:
        result = MergeResult.model_validate_json((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
    return result if result.adapter_digest == digest else None


def refuse_foreign(spec: MergeSpec, manifest: dict[str, Any]) -> None:
    """Only an adapter that was trained on this base model, and whose method changes weights, can be merged."""
    trained_on = (manifest.get("baseModel") or {}).get("digest", "")
    if spec.base_digest and trained_on and trained_on != spec.base_digest:
        raise RunFailure(
            failures.UNSUPPORTED_COMBINATION,
            f"{spec.name} was trained on base model {trained_on}, this deployment serves {spec.base_digest}: "
            "deploy it with the base model that it was trained on",
        )


def combine(spec: MergeSpec, base: Path, adapter: Path, manifest: dict[str, Any], output: Path) -> MergeResult:
    """Load, merge, compare, write."""
    import torch

    dtype = output_dtype(spec)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    refuse_unmergeable(spec, config)
    scores = gives_scores(config)
    tokenizer, texts = _tokenizer(base, spec), prompts_for(spec.prompts, manifest.get("prompts", []))
    model = load_as_trained(base, manifest, dtype, spec.trust_remote_code, scores)
    batches = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        untuned = [_logits(model, ids) for ids in batches] if not scores else []
        tuned = _mount(model, adapter)
        mounted = [_logits(tuned, ids) for ids in batches]
        merged_model = tuned.merge_and_unload(safe_merge=True)
        untie(merged_model)
        merged = [_logits(merged_model, ids) for ids in batches]
    agreement = compare_scores(mounted, merged) if scores else compare(untuned, mounted, merged)
    log.info(
        "merged and mounted %s differ by %.2g standard deviations (at most %.2g)",
        "scores" if scores else "logits", agreement.logits, TOLERANCE[dtype],
    )  # fmt: skip
    if not scores:
        log.info("merged and base model differ by %.3g in log probability", agreement.effect)
    if wrong := agreement.refusal(dtype, spec.min_logprob_delta):
        raise RunFailure(failures.UNSUPPORTED_COMBINATION, f"{spec.name}: {wrong}")
    result = MergeResult(
        adapter_digest=spec.adapter_digest,
        compared="scores" if scores else "logits",
        logit_difference=float(f"{agreement.logits:.4g}"),
        tolerance=TOLERANCE[dtype],
        logprob_delta=None if scores else float(f"{agreement.effect:.4g}"),
        dtype=dtype,
    )
    write(merged_model, base, adapter, output, result)
    return result


def output_dtype(spec: MergeSpec) -> str:
    """bfloat16, unless it is the CPU that will serve the model and it would only emulate it."""
    if spec.precision != "Auto":
        return {"BF16": "bfloat16", "FP16": "float16", "FP32": "float32"}[spec.precision]
    return "bfloat16" if spec.gpus or cpu_has_bf16() else "float32"


def refuse_unmergeable(spec: MergeSpec, config: dict[str, Any]) -> None:
    if refusal := fold_refusal(config) if spec.exported else merge_refusal(config):
        raise RunFailure(failures.UNSUPPORTED_COMBINATION, f"{spec.name}: {refusal}")


def load_as_trained(
    base: Path, manifest: dict[str, Any], dtype: str, remote_code: bool, scores: bool = False
) -> PreTrainedModel:
    """The base model with the weights that the adapter saw in training, expanded to `dtype`; the original ones for an
    adapter that was made to stand on those."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    from finetune_trainer.training.quantization import falcon_quantized, was_transposed

    kind = "None" if manifest.get("onOriginalWeights") else manifest.get("quantization") or "None"
    network: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    quantization: dict[str, Any] = {}
    if kind in ("NF4", "FP4"):
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind.lower(),
            bnb_4bit_use_double_quant=bool(manifest.get("doubleQuant", True)),
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    elif kind == "INT8":
        quantization["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    log.info("loading the base model (%s as in training, then %s)", kind, dtype)
    with falcon_quantized() if quantization else nullcontext():
        model: PreTrainedModel = network.from_pretrained(
            str(base),
            dtype=getattr(torch, dtype),
            trust_remote_code=remote_code,
            local_files_only=True,
            device_map="cpu",
            **({"num_labels": 1} if scores else {}),
            **quantization,
        )
    if quantization:
        transposed = [name for name, layer in model.named_modules() if was_transposed(layer)]
        model = model.dequantize()
        for name in transposed:
            _transpose_back(model, name)
        # transformers leaves its marks, by which PEFT refuses to merge IA3 and AdaLoRA into what are full weights now.
        for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            setattr(model, mark, False)
    model = model.to(getattr(torch, dtype)).eval()
    return model


def _transpose_back(model: PreTrainedModel, name: str) -> None:
    """A Conv1D of GPT-2 became a linear layer when it was quantized; the merged model's class wants it back."""
    import torch
    from transformers.pytorch_utils import Conv1D

    linear: Any = model.get_submodule(name)
    with torch.device("meta"):
        layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight, layer.bias = torch.nn.Parameter(linear.weight.data.T.contiguous(), requires_grad=False), linear.bias
    model.set_submodule(name, layer)


def untie(model: PreTrainedModel) -> None:
    """An output head or embedding that was trained whole is no longer the other one; loading must not make it so."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is not None and head.weight.data_ptr() != embedding.weight.data_ptr():
        for config in (model.config, model.config.get_text_config()):  # the same one, unless the model is multimodal
            config.tie_word_embeddings = False


def compare(
    untuned: Sequence[torch.Tensor], mounted: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]
) -> Agreement:
    """Means over all places of all prompts; each tensor is [places, vocabulary], float32."""
    import torch

    logits, effect, rounding = 0.0, 0.0, 0.0
    for base, there, here in zip(untuned, mounted, merged, strict=True):
        logits = max(logits, float((here - there).abs().mean() / there.std()))
        likeliest = base.topk(LIKELIEST, dim=-1).indices
        of_base, of_mounted, of_merged = (
            torch.log_softmax(values, dim=-1).gather(-1, likeliest) for values in (base, there, here)
        )
        effect = max(effect, float((of_merged - of_base).abs().mean()))
        rounding = max(rounding, float((of_merged - of_mounted).abs().mean()))
    return Agreement(logits, effect, rounding)


def compare_scores(mounted: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> Agreement:
    """Of a reward model, over all prompts; its base has no score, so there is no effect to be compared."""
    import torch

    there, here = torch.cat(list(mounted)), torch.cat(list(merged))
    return Agreement(float((here - there).abs().mean() / there.std()), effect=0.0, rounding=0.0)


def write(model: PreTrainedModel, base: Path, adapter: Path, output: Path, result: MergeResult) -> None:
    """Weights, configuration and tokenizer; the record last, so that half a model is never taken for a whole one."""
    draft = output.with_name(output.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft, max_shard_size="5GB")
    for source in (
        base,
        adapter,
    ):  # the adapter's chat template and tokenizer, where it brings them, replace the base's
        for path in source.iterdir():
            if _is_text_side(path):
                shutil.copyfile(path, draft / path.name)
    (draft / RECORD).write_text(result.model_dump_json(by_alias=True, exclude_none=True), encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    os.replace(draft, output)
    log.info("wrote %s", output)


def _is_text_side(path: Path) -> bool:
    """Tokenizer, chat template and the model's own code; not weights, not the base's idea of its dtype."""
    name = path.name
    return path.is_file() and (
        name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece"))
        or name == "generation_config.json"
        or name.endswith((".jinja", ".tiktoken", ".py"))
    )


def _tokenizer(base: Path, spec: MergeSpec) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(base), trust_remote_code=spec.trust_remote_code, local_files_only=True)


def _mount(model: PreTrainedModel, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter), is_trainable=False).eval()


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[places, vocabulary] of one prompt, in float32; of a reward model its score [1]."""
    values: torch.Tensor = model(input_ids=ids).logits[0].float()
    return values
