"""The artifact of a run: adapter weights, a configuration that says the same on every machine, tokenizer, model card, lineage."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from finetune_operator.api.finetunestatus import AdapterStatus, EvaluationStatus
from finetune_trainer.digest import hash_tree, hex_of, short, tree_digest
from finetune_trainer.failures import INTERNAL_ERROR, NON_FINITE_LOSS, UPLOAD_FAILED, RunFailure
from finetune_trainer.methods.initialization import Tensors, starts_from_weights
from finetune_trainer.methods.plainlora import without_singular_values, without_start
from finetune_trainer.methods.servable import merge_refusal, mount_refusal, rank_of
from finetune_trainer.results.modelcard import CARD, base_name, model_card
from finetune_trainer.runspec import RunSpec
from finetune_trainer.sources import basemodel
from finetune_trainer.storage.store import Store

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def write_adapter(model: "PeftModel", run: RunSpec, folder: Path, initial: Tensors) -> dict[str, Any]:
    """Weights and configuration of what was trained; returns the configuration.

    Raises: RunFailure when the adapter changes nothing or is not finite: it would be served as if it had learned something.
    """
    from peft import get_peft_model_state_dict

    if run.spec.method.type == "AdaLoRA":
        weights, config = without_singular_values(model)
    else:
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
        weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in found.items()}
        config = model.peft_config["default"].to_dict()
    if starts_from_weights(run.spec):
        weights, config = without_start(weights, initial, config)
    config = portable_config(config, base_name(run.spec), run)
    refuse_broken(weights, config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes 0600, which another user's pod cannot read
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config


def portable_config(config: dict[str, Any], base: str, run: RunSpec) -> dict[str, Any]:
    """PEFT's configuration without what differs from run to run: paths, the order of sets, the way it was initialised."""
    config = {key: _plain(value) for key, value in config.items()}
    config["base_model_name_or_path"] = base
    config["revision"] = (
        run.prepared.base_model.revision or None if run.spec.base_model.hugging_face and run.prepared else None
    )
    config["inference_mode"] = True
    if "init_lora_weights" in config:
        config["init_lora_weights"] = True  # otherwise loading would take the start out of the base weights again
        config["eva_config"] = None
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)  # enumerations


def refuse_broken(weights: Tensors, config: dict[str, Any]) -> None:
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise RunFailure(
                NON_FINITE_LOSS, f"{name} of the trained adapter is not finite; lower training.learningRate"
            )
    starts_at_zero = [tensor for name, tensor in weights.items() if "lora_B" in name]
    if starts_at_zero and not any(bool(tensor.any()) for tensor in starts_at_zero):
        raise RunFailure(
            INTERNAL_ERROR,
            "the trained adapter is still zero and would change nothing; check that training.learningRate is not too small "
            "and that the rows have tokens to be learned",
        )


def publish(
    run: RunSpec,
    store: Store,
    folder: Path,
    config: dict[str, Any],
    trained_parameters: int,
    evaluation: EvaluationStatus,
    prompts: list[str],
) -> AdapterStatus:
    """Model card beside the adapter, everything to `adapters/<digest>/`, manifest last; returns what status.adapter shows."""
    assert run.prepared
    license = basemodel.license_of(store, run.prepared.base_model.digest)
    (folder / CARD).write_text(model_card(run, config, trained_parameters, evaluation, license))
    files = hash_tree(folder)
    digest = tree_digest(files)
    prefix = f"adapters/{hex_of(digest)}"
    status = AdapterStatus(
        uri=store.uri(prefix),
        digest=digest,
        size_bytes=sum(file.size for file in files),
        rank=rank_of(config),
        method=run.spec.method.type,
        mount_refusal=mount_refusal(config),
        merge_refusal=merge_refusal(config),
        trainable_parameters=trained_parameters,
        gate_passed=evaluation.passed,
        base_model_uri=run.prepared.base_model.uri,
        base_model_digest=run.prepared.base_model.digest,
        run_id=run.prepared.run_id,
    )
    uploaded = store.upload_tree(folder, prefix, lineage(run, config, evaluation, prompts), files)
    if uploaded != digest:
        raise RunFailure(UPLOAD_FAILED, f"{store.uri(prefix)} reads back as {uploaded}, not {digest}; run again")
    log.info("adapter: %s, %.1f MB, %s", short(digest), status.size_bytes / 1e6, status.uri)
    return status


def lineage(run: RunSpec, config: dict[str, Any], evaluation: EvaluationStatus, prompts: list[str]) -> dict[str, Any]:
    """What the manifest says beside the files: from what the adapter was made, and how good it is."""
    import peft
    import transformers

    assert run.prepared
    model, dataset = run.prepared.base_model, run.prepared.dataset
    return {
        "kind": "Adapter",
        "runId": run.prepared.run_id,
        "baseModel": {
            "name": base_name(run.spec),
            "revision": model.revision,
            "digest": model.digest,
            "uri": model.uri,
        },
        "dataset": {"digest": dataset.digest, "format": dataset.format, "samples": dataset.samples},
        "method": run.spec.method.type,
        "quantization": run.spec.method.quantization.type,
        "doubleQuant": run.spec.method.quantization.double_quant,
        # LoftQ made up for the quantization while training; what is left of it belongs on the original weights.
        "onOriginalWeights": starts_from_weights(run.spec),
        "objective": run.spec.objective.type,
        "rank": rank_of(config),
        "targetModules": config.get("target_modules"),
        "evaluation": evaluation.model_dump(mode="json", by_alias=True, exclude_none=True),
        "gatePassed": evaluation.passed,
        "prompts": prompts,
        "trainerImage": run.trainer_image,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }
