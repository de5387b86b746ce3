"""How an adapter starts where PEFT alone does not do it right: from the base weights, the data, the quantization, a text."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.data.batches import IGNORE, Batch
from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.methods.combinations import LORA_METHODS
from finetune_trainer.methods.configs import FROM_WEIGHTS, REBASED, keep_trainables_exact, peft_config, trainable
from finetune_trainer.methods.dropout import lighten
from finetune_trainer.training.attention import packed
from finetune_trainer.training.checkpoint import Snapshot
from finetune_trainer.training.quantization import was_transposed
from finetune_trainer.training.shards import Shards
from finetune_trainer.training.startup import bitsandbytes_if_loaded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
EVA_TOKENS = 65536  # enough for its components to settle; the whole dataset takes many times longer


def is_rebased(spec: FineTuneSpec) -> bool:
    """Whether the adapter's start was taken out of the base weights (PiSSA, OLoRA)."""
    return spec.method.type in LORA_METHODS and spec.method.lora.initialization in REBASED


def starts_from_weights(spec: FineTuneSpec) -> bool:
    """Whether the adapter changes the model before anything was learned (PiSSA, OLoRA, LoftQ)."""
    return spec.method.type in LORA_METHODS and spec.method.lora.initialization in FROM_WEIGHTS


def initialize(
    model: "PreTrainedModel",
    spec: FineTuneSpec,
    steps: int,
    folder: Path,
    batches: Iterator[Batch],
    snapshot: Snapshot | None,
    shards: Shards | None = None,
) -> tuple["PeftModel", Tensors]:
    """The base model wrapped with a fresh adapter, and the start of what no longer is the base model's when the adapter
    is switched off.

    A run that goes on from a snapshot takes that start from it, and skips what would be overwritten. `shards`: of a base
    model that is shared out.
    """
    torch.manual_seed(spec.training.seed)  # the same start in every process and attempt
    config: Any = peft_config(spec, steps, model)
    start = spec.method.lora.initialization if spec.method.type in LORA_METHODS else "Default"
    if snapshot and (is_rebased(spec) or start == "EVA"):
        config.init_lora_weights = True
    with shards.adapting(model) if shards else nullcontext():
        wrapped = _wrap(model, config, spec)
        keep_trainables_exact(wrapped)
        lighten(wrapped)
        if snapshot:
            initial = snapshot.tensors.get("initial", {})
            if is_rebased(spec):
                take_out_of_base(wrapped, initial)
            return wrapped, initial
        if start == "LoftQ":
            start_from_quantization_error(wrapped, folder)
    if start == "EVA":
        start_from_data(wrapped, batches)
    elif spec.method.type == "PromptTuning" and spec.method.virtual_tokens.init_text:
        start_from_text(wrapped, _token_ids(folder, spec.method.virtual_tokens.init_text))
    keep_trainables_exact(wrapped)
    return wrapped, starting_values(wrapped, spec)


def _wrap(model: "PreTrainedModel", config: Any, spec: FineTuneSpec) -> "PeftModel":
    """Raises: RunFailure for what only PEFT knows that it cannot do with this model."""
    from peft import PeftModel, get_peft_model

    try:
        with bitsandbytes_if_loaded():
            wrapped = get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            f"method: PEFT cannot apply {spec.method.type} to this model: {error}; change method",
        ) from error
    assert isinstance(wrapped, PeftModel)
    return wrapped


def starting_values(model: "PeftModel", spec: FineTuneSpec) -> Tensors:
    """Matrices that changed the model before they learned anything, and biases, which are the base model's own."""
    if spec.method.type not in LORA_METHODS:
        return {}
    matrices, biases = starts_from_weights(spec), spec.method.lora.bias != "None"
    return {
        name: parameter.detach().clone()
        for name, parameter in trainable(model).items()
        if (matrices and ".lora_" in name) or (biases and name.endswith(".bias") and ".modules_to_save." not in name)
    }


def _token_ids(folder: Path, text: str) -> list[int]:
    from finetune_trainer.data.tokenizer import load_tokenizer

    return list(load_tokenizer(folder).backend.encode(text, add_special_tokens=False).ids)


def take_out_of_base(model: "PeftModel", initial: Tensors) -> None:
    """On resume: W - scaling * B0 A0, with the very A0 and B0 of the first attempt; another node's SVD may differ."""
    from peft.utils import integrations

    for name, layer in model.named_modules():
        start_a, start_b = (initial.get(f"{name}.lora_{half}.default.weight") for half in "AB")
        if start_a is None or start_b is None:
            continue
        weight = layer.get_base_layer().weight
        flipped = bool(getattr(layer, "fan_in_fan_out", False))
        start_a, start_b = start_a.to(weight.device), start_b.to(weight.device)
        with integrations.gather_params_ctx(weight):
            exact = weight.data.float().T if flipped else weight.data.float()
            exact = exact - layer.scaling["default"] * start_b @ start_a
            weight.data = (exact.T if flipped else exact).to(weight.dtype)


@contextmanager
def as_base(model: "PeftModel", initial: Tensors) -> Iterator[None]:
    """Within it the model computes what the base model does."""
    parameters = trainable(model)
    trained = {name: parameters[name].data for name in initial}
    # an adapter that stood for a part of the base goes back to its start; any other is switched off
    off = _whole_layers_off(model) if any(".lora_" in name for name in initial) else model.disable_adapter()
    try:
        for name, start in initial.items():
            parameters[name].data = start.to(trained[name].device)
        with off:
            yield
    finally:
        for name, data in trained.items():
            parameters[name].data = data


@contextmanager
def _whole_layers_off(model: "PeftModel") -> Iterator[None]:
    """Within it the layers that are trained whole (modulesToSave) are the base model's."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [layer for layer in model.modules() if isinstance(layer, AuxiliaryTrainingWrapper)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def start_from_quantization_error(model: "PeftModel", folder: Path) -> None:
    """LoftQ for a 4-bit base: A and B become the best low-rank fit of what quantization lost."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit
    from peft.utils import integrations

    weights = _Weights(folder)
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A") or not isinstance(getattr(layer, "base_layer", None), Linear4bit):
            continue
        stored = layer.base_layer.weight
        with integrations.gather_params_ctx(stored):
            quantized = dequantize_4bit(stored.data, stored.quant_state).float()
        exact = weights.read(name.removeprefix("base_model.model.") + ".weight").to(quantized.device).float()
        if was_transposed(layer.base_layer):
            exact = exact.T
        left, values, right = torch.linalg.svd(exact - quantized, full_matrices=False)
        rank, scaling = layer.r["default"], layer.scaling["default"]
        root = (values[:rank] / scaling).sqrt()
        layer.lora_B["default"].weight.data = (left[:, :rank] * root).contiguous()
        layer.lora_A["default"].weight.data = (root[:, None] * right[:rank]).contiguous()


class _Weights:
    """Single tensors out of a model folder's safetensors files."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._open: Callable[..., AbstractContextManager[Any]] = safe_open
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)

    def read(self, name: str) -> torch.Tensor:
        found = name if name in self._files else name.partition(".")[2]  # a file may lack the leading "model."
        with self._open(self._files[found], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(found)
            return tensor


def start_from_data(model: "PeftModel", batches: Iterator[Batch]) -> None:
    """EVA: A becomes the leading directions of what each target really gets as input.

    Raises: RunFailure when there is too little data for the rank: PEFT would go round and round without an end.
    """
    from peft import initialize_lora_eva_weights

    config: Any = model.peft_config["default"]
    needed = max([config.r, *(config.rank_pattern or {}).values()])
    enough = list(_tokens_up_to(EVA_TOKENS, (batch for batch in batches if batch.tokens >= needed)))
    if not enough:
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            f"method.lora.initialization: EVA with rank {needed} needs {needed} tokens in a micro batch; raise "
            "training.microBatchSize, lower method.lora.rank, or use initialization Default",
        )

    def forward(module: torch.nn.Module, batch: Batch) -> None:
        with packed(batch):
            module(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)

    def places(batch: Batch, _: object) -> torch.Tensor:
        """Where something is learned; everywhere, where that is too little to decompose."""
        learned = (batch.targets != IGNORE).flatten()
        return learned if int(learned.sum()) >= needed else torch.ones_like(learned)

    asked = config.target_modules, config.rank_pattern, config.alpha_pattern
    initialize_lora_eva_weights(
        model,
        enough,
        forward_fn=forward,
        prepare_model_inputs_fn=places,
        prepare_layer_inputs_fn=lambda inputs, chosen, name: _first(inputs).flatten(0, -2)[chosen],
        show_progress_bar=False,
    )
    # Ranks stay as they are (rho is 1); PEFT writes the same out layer by layer, which a resumed run would not.
    config.target_modules, config.rank_pattern, config.alpha_pattern = asked


def _tokens_up_to(most: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    tokens = 0
    for batch in batches:
        yield batch
        tokens += batch.tokens
        if tokens >= most:
            return


def _first(inputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return inputs[0] if isinstance(inputs, tuple) else inputs


@torch.no_grad()
def start_from_text(model: Any, text_ids: list[int]) -> None:
    """PromptTuning: virtual tokens start as the embeddings of a text, repeated or cut to their number."""
    prompt = model.prompt_encoder["default"].embedding.weight
    ids = torch.tensor((text_ids * (len(prompt) // len(text_ids) + 1))[: len(prompt)], device=prompt.device)
    prompt.copy_(model.get_input_embeddings()(ids))
