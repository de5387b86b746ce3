"""The model of a run as lm-eval asks it: the weights that are loaded, batches of bounded size, the work shared by all processes.

Tokenization, truncation and stopping are those of lm-eval's own HFLM; a test holds the two together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    DEFAULT_MAX_LENGTH,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from finetune_trainer.data.batches import IGNORE, LAYOUTS, Row
from finetune_trainer.objectives.answers import Autocast
from finetune_trainer.objectives.loss import CHUNK, learned_logits
from finetune_trainer.training.attention import generating, packed
from finetune_trainer.training.distributed import World, gathered, sum_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FEWEST = 2048  # tokens of a batch that have room wherever a row could be trained
GENERATED = 256  # tokens of an answer where the task does not say
SAY_EVERY = 30.0  # seconds between two log lines

Encoded = tuple[Any, list[int], list[int]]  # what lm-eval calls it by, context, continuation


class Text(NamedTuple):
    """A row for the model, and whose continuations end it: requests that differ in the last token are one row."""

    row: Row
    requests: list[int]


class LoadedModel(TemplateLM):  # type: ignore[misc]
    """A model with its adapter, switched on or off by the caller.

    `tokens`: that were trained at once; a batch has about as many.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        layout: str,
        autocast: Autocast,
        tokens: int,
        world: World,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.collate, self.autocast = model, tokenizer, LAYOUTS[layout], autocast
        self.tokens, self.world, self._device = max(FEWEST, tokens), world, device
        self.padded = layout == "padded"
        self.unpadded = model.active_peft_config.is_prompt_learning  # PEFT counts padding after virtual tokens as text
        self.max_length = resolve_max_length(model.get_base_model().config, tokenizer, default=DEFAULT_MAX_LENGTH)
        model.eval()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(bos if bos is not None else self.tokenizer.eos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids with the tokenizer's own special tokens, unless the text begins with them already."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        if add_special_tokens is None:
            return list(self.tokenizer.encode(string))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    # ---- how likely a text is ----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log probability of each continuation after its context, and whether greedy decoding would say it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        """(log probability, whether it is what greedy decoding would say) of each continuation."""
        requests = [(name, context, answer[-self.max_length :]) for name, context, answer in requests]
        found = torch.zeros(len(requests), 2, dtype=torch.float64)
        pace = Pace("questions", len(requests))
        for batch in self._mine(list(self._batches(self._texts(requests)))):
            rows = [text.row for text in batch]
            inputs = self.collate(rows).to(self._device)
            with packed(inputs), self.autocast():
                logits, _targets = learned_logits(self.model, inputs)
            self._read(logits, batch, requests, found)
            pace.done(sum(len(text.requests) for text in batch) * self.world.size)
        # the wrong tokens are counted, so that no continuation is greedy before its process has answered
        found = found.to(self._device)
        sum_tensor(self.world, found)
        return [(float(logprob), wrong == 0) for logprob, wrong in found.tolist()]

    def _texts(self, requests: list[Encoded]) -> list[Text]:
        """Rows, longest first: what does not fit in memory is told at once."""
        grouped: dict[tuple[int, ...], list[int]] = {}
        wholes = [(context + answer)[-(self.max_length + 1) :] for _, context, answer in requests]
        for index, whole in enumerate(wholes):
            grouped.setdefault(tuple(whole[:-1]), []).append(index)
        texts = []
        for members in grouped.values():
            ids = np.array(wholes[members[0]], dtype=np.int32)
            labels = np.full_like(ids, IGNORE)
            longest = max(len(requests[index][2]) for index in members)
            labels[len(ids) - longest :] = ids[len(ids) - longest :]
            texts.append(Text(Row(ids, labels, np.array([len(ids)], dtype=np.int32)), members))
        return sorted(texts, key=lambda text: -len(text.row.input_ids))

    def _batches(self, texts: Sequence[Text]) -> Iterator[list[Text]]:
        batch: list[Text] = []
        for text in texts:
            longest = len((batch[0] if self.padded and batch else text).row.input_ids)
            size = sum(len(one.row.input_ids) for one in batch) if not self.padded else longest * len(batch)
            if batch and size + longest > self.tokens:
                yield batch
                batch = []
            batch.append(text)
        if batch:
            yield batch

    def _read(self, logits: torch.Tensor, batch: Sequence[Text], requests: list[Encoded], found: torch.Tensor) -> None:
        """Take each request's tokens out of the logits [scored positions of the batch, words]."""
        places: list[int] = []
        wanted: list[int] = []
        owners: list[int] = []
        end = 0
        for text in batch:
            end += int((text.row.labels != IGNORE).sum())
            for index in text.requests:
                answer = requests[index][2]
                places += range(end - len(answer), end)
                wanted += answer
                owners += [index] * len(answer)
        best = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        normaliser = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for start in range(0, len(logits), CHUNK):
            part = logits[start : start + CHUNK].float()
            normaliser[start : start + CHUNK] = part.logsumexp(dim=-1)
            best[start : start + CHUNK] = part.argmax(dim=-1)
        at, words = (torch.tensor(values, dtype=torch.int64, device=logits.device) for values in (places, wanted))
        logprobs = (logits[at, words].float() - normaliser[at]).double().cpu()
        wrong = (best[at] != words).double().cpu()
        found.index_add_(0, torch.tensor(owners, dtype=torch.int64), torch.stack([logprobs, wrong], dim=1))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, in windows as long as the model can read."""
        windows: list[Encoded] = []
        owners: list[int] = []
        for index, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, answer in map(make_disjoint_window, rolling):
                windows.append((None, context, answer))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    # ---- what the model writes ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, up to the task's end marks."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        options = [normalize_gen_kwargs(request.args[1], GENERATED) for request in requests]
        pace = Pace("answers", len(requests))
        torch.manual_seed(0)  # for tasks that sample: base and adapter draw the same
        written: list[tuple[int, str]] = []
        with generating(self.model.get_base_model()):
            for batch in self._mine(list(self._prompt_batches(prompts, options))):
                texts = self._generate([prompts[index] for index in batch], dict(options[batch[0]]))
                written += zip(batch, texts, strict=True)
                pace.done(len(batch) * self.world.size)
        return [text for _, text in sorted(gathered(self.world, written))]

    def _prompt_batches(self, prompts: list[list[int]], options: Sequence[Any]) -> Iterator[list[int]]:
        """Prompts with the same options, longest first, as many as have room with their answers."""
        order = sorted(range(len(prompts)), key=lambda index: (repr(options[index]), -len(prompts[index])))
        batch: list[int] = []
        for index in order:
            first = batch[0] if batch else index
            room = len(prompts[first]) + options[first]["max_gen_toks"]
            apart = self.unpadded and len(prompts[index]) != len(prompts[first])
            if batch and (apart or options[index] != options[first] or (len(batch) + 1) * room > self.tokens):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        answer = options.pop("max_gen_toks")
        room = max(1, self.max_length - answer)
        longest = min(room, max(len(prompt) for prompt in prompts))
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eot_token_id
        ids = torch.full((len(prompts), longest), padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            kept = torch.tensor(prompt[-longest:])
            ids[row, longest - len(kept) :], mask[row, longest - len(kept) :] = kept, 1
        if not options.get("do_sample"):
            options.pop("temperature", None)
        with self.autocast():
            made = self.model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=answer,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, until, longest, len(prompts)),
                pad_token_id=padding,
                use_cache=True,
                **options,
            )
        texts = (self.tokenizer.decode(row[longest:], skip_special_tokens=True) for row in made.tolist())
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _mine(self, batches: list[Any]) -> list[Any]:
        """The batches of this process: neighbours are of one length, so all have about as much to do."""
        return batches[self.world.rank :: self.world.size]


class Pace:
    """Says now and then how far it is: thousands of questions take minutes."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.count, self.said = what, total, 0, time.monotonic()

    def done(self, count: int) -> None:
        self.count += count
        if time.monotonic() - self.said >= SAY_EVERY:
            self.said = time.monotonic()
            log.info("tasks: %d of %d %s", min(self.count, self.total), self.total, self.what)
