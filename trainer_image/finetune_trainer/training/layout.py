"""Which layout a model can be trained in: padding-free where its attention provably keeps samples apart, else padded."""

import logging
from typing import Any

import numpy as np
import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.data.batches import Row, flat, padded
from finetune_trainer.methods.combinations import virtual_tokens
from finetune_trainer.objectives.loss import logits_of
from finetune_trainer.training import attention

log = logging.getLogger(__name__)

LENGTHS = (5, 9, 3)  # of the samples of the check
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}  # of the logits' spread


def choose_layout(model: Any, spec: FineTuneSpec) -> str:
    """`flat` after the model has shown that packed samples get the logits that they get alone, else `padded`.

    Models differ (recurrent layers, soft caps, position biases), so they are measured rather than listed.
    """
    if virtual_tokens(spec) or spec.objective.type == "Reward":
        return "padded"  # virtual tokens stand before every sample; a score belongs to a whole row
    native = model.config._attn_implementation
    attention.register()
    try:
        difference = isolation(model, native)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        log.info("attention: this model cannot be packed without padding (%s); samples are padded instead", error)
        model.set_attn_implementation(native)
        return "padded"
    allowed = TOLERANCE[model.dtype]
    if not difference <= allowed:  # also when it is not a number
        log.info(
            "attention: packed samples see each other (%.1e > %.0e); samples are padded instead", difference, allowed
        )
        model.set_attn_implementation(native)
        return "padded"
    log.info("attention: packed samples do not see each other (%.1e <= %.0e)", difference, allowed)
    return "flat"


@torch.no_grad()
def isolation(model: Any, native: str) -> float:
    """Largest difference of logits between packed samples and each alone with the model's own attention, in parts of
    the logits' spread. Leaves the model with the packed attention."""
    model.eval()
    generator = np.random.default_rng(0)
    ids = generator.integers(0, model.get_input_embeddings().weight.shape[0], sum(LENGTHS)).astype(np.int32)
    row = Row(ids, ids, np.array(LENGTHS, dtype=np.int32))
    alone = logits_of(model, padded([row]).to(model.device)).float()
    model.set_attn_implementation(attention.NAME)
    together = logits_of(model, flat([row]).to(model.device)).float()
    return float((together - alone).abs().max() / alone.std().clamp(min=1e-6))
