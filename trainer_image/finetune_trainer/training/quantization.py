"""The frozen base model: loaded once, quantized on the way in, on the device where it stays."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.methods.combinations import quantization_type
from finetune_trainer.training.eager import no_compiler
from finetune_trainer.training.precision import DTYPES, Precision
from finetune_trainer.training.shards import Shards

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

log = logging.getLogger(__name__)


def quantization_config(spec: FineTuneSpec, precision: Precision) -> "BitsAndBytesConfig | None":
    """The bitsandbytes configuration of `method.quantization`, None for full weights.

    The compute dtype follows the run's precision unless it is given: emulated bf16 would make NF4 15 times slower.
    """
    kind = quantization_type(spec)
    if kind == "None":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "INT8":
        return BitsAndBytesConfig(load_in_8bit=True)
    asked = spec.method.quantization
    compute = DTYPES.get(asked.compute_dtype, precision.compute)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.lower(),
        bnb_4bit_use_double_quant=asked.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute),
    )


@no_compiler()
def load_base_model(
    folder: Path, spec: FineTuneSpec, precision: Precision, device: torch.device, shards: Shards | None = None
) -> "PreTrainedModel":
    """The base model in `folder`, frozen, in the run's precision, quantized as asked; whole, or this process's part.

    Embeddings, norms and head stay in the compute dtype: norms compute in float32 anyway, and a float32 head (what
    prepare_model_for_kbit_training makes of it) costs gigabytes with a large vocabulary.
    """
    import transformers

    kind, arguments = "AutoModelForCausalLM", dict[str, Any]()
    if spec.objective.type == "Reward":
        refuse_without_score(folder, spec)
        kind, arguments = "AutoModelForSequenceClassification", {"num_labels": 1}
        torch.manual_seed(spec.training.seed)  # its head is new, and the same in every process and attempt
    config = quantization_config(spec, precision)
    if config is not None:
        arguments["quantization_config"] = config
    if device.type == "cuda":
        arguments["device_map"] = {"": device.index or 0}
    with shards.loading() if shards else nullcontext(), falcon_quantized() if config else nullcontext():
        model: PreTrainedModel = getattr(transformers, kind).from_pretrained(
            str(folder),
            dtype=getattr(torch, precision.compute),
            trust_remote_code=spec.base_model.trust_remote_code,
            local_files_only=True,
            **arguments,
        )
    if config is not None:
        refuse_unquantized(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    if config is not None and config.load_in_4bit and device.type == "cpu":
        keep_packing_out(model)
    if shards:
        shards.attach(model)
    return model


@contextmanager
def falcon_quantized() -> Iterator[None]:
    """Within it falcon's layers are nn.Linear, which alone transformers quantizes; its own class computes the same."""
    from transformers.models.falcon import modeling_falcon

    own = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = torch.nn.Linear  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = own  # type: ignore[misc]


def refuse_unquantized(model: torch.nn.Module) -> None:
    """RunFailure when transformers found no layer to quantize, of which it only warns."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    if not any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            f"method.quantization: transformers quantizes no layer of {type(model).__name__}; use method.type LoRA with "
            "quantization.type None",
        )


def was_transposed(layer: torch.nn.Module) -> bool:
    """Whether a quantized layer was a Conv1D (GPT-2), whose weights are stored the other way round."""
    return getattr(getattr(layer, "source_cls", None), "__name__", "") == "Conv1D"


def refuse_without_score(folder: Path, spec: FineTuneSpec) -> None:
    """RunFailure when transformers cannot give this kind of model a score."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    remote_code = spec.base_model.trust_remote_code
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=remote_code, local_files_only=True)
    if config.model_type not in KNOWN and not remote_code:
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            f"objective.type: transformers has no sequence classification for a {config.model_type} model, so it cannot "
            "be a Reward model; use another base model, or DPO",
        )


def keep_packing_out(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from re-packing 4-bit weights in place on the first evaluation on an AVX512-BF16 CPU.

    Training through packed weights gives wrong gradients without an error (bitsandbytes issue 2078), so an evaluation
    in the middle of a run would silently spoil the rest of it.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
