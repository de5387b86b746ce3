"""Reward: a model that gives the chosen answer a higher score than the rejected one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from finetune_operator.api.finetune import FineTuneSpec
from finetune_trainer.data.batches import Batch, Row, padded
from finetune_trainer.objectives.answers import Autocast
from finetune_trainer.objectives.pairs import Judged, Pairs, bradley_terry
from finetune_trainer.training.attention import packed


class Reward(Pairs):
    """Bradley and Terry: -log sigmoid(score of the chosen - score of the rejected), mean over the pairs.

    The score is that of the last token, as transformers' sequence classification reads it; its head is new, so the base
    model has no score to compare with.
    """

    base: ClassVar[Mapping[str, float] | None] = {}

    def __init__(self, spec: FineTuneSpec, layout: str, autocast: Autocast) -> None:
        self.autocast = autocast

    @contextmanager
    def judged(
        self, model: torch.nn.Module, rows: list[Row], totals: Mapping[str, float], device: torch.device
    ) -> Iterator[Judged]:
        batch = padded(rows).to(device)
        with packed(batch):
            chosen, rejected = self.scores(model, batch).view(-1, 2).unbind(1)
            yield bradley_terry(chosen, rejected)

    def scores(self, model: Any, batch: Batch) -> torch.Tensor:
        """The score of each sample [samples], in float32: bf16 could not tell close answers apart."""
        network = model.get_base_model() if hasattr(model, "get_base_model") else model
        with self.autocast():
            hidden = getattr(network, network.base_model_prefix)(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
        ends = last_tokens(batch, network.config.get_text_config().pad_token_id)
        scores: torch.Tensor = network.score(hidden[torch.arange(len(ends)), ends].float())[:, 0]
        return scores


def last_tokens(batch: Batch, padding: int | None) -> torch.Tensor:
    """Where each sample's score is read: at its last token that is not the model's padding token, so that whoever loads
    the model and pads with that token gets the same score."""
    assert batch.attention_mask is not None
    counts = batch.attention_mask if padding is None else batch.attention_mask * (batch.input_ids != padding)
    places = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return (places * counts).argmax(-1)
