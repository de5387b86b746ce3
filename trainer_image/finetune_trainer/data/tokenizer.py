"""Samples into token ids and labels, in batches, with the tokenizer of the base model.

Reads tokenizer.json with the tokenizers library itself: importing transformers costs seconds and pulls in torch. Models
that have only a SentencePiece or tiktoken file go through transformers once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from finetune_trainer.data.chat import ChatTemplate, Span, default_template
from finetune_trainer.data.formats import Conversation, Judged, Pair, Preference, Sample, Text
from finetune_trainer.digest import canonical_json, sha256_hex
from finetune_trainer.failures import BASE_MODEL_NOT_FOUND, RunFailure

log = logging.getLogger(__name__)

IGNORE = -100  # the label of a token that is not learned
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
# Tokens that end an assistant turn in the templates of the field; those that the vocabulary has are used.
_END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|END_OF_TURN_TOKEN|>",
    "<|end_of_text|>",
    "<|endoftext|>", "<turn|>", "</s>",
)  # fmt: skip


class Tokens(NamedTuple):
    """One sequence (int32 arrays of the same length); the first label is IGNORE, since nothing precedes it."""

    input_ids: np.ndarray
    labels: np.ndarray


class Rendered(NamedTuple):
    """Text that is ready to be tokenized, and the stretches of it that are learned; `whole`: BOS and EOS are still to
    be added.
    """

    text: str
    spans: list[Span]
    whole: bool


@dataclass(frozen=True)
class ModelTokenizer:
    """The base model's tokenizer and chat template."""

    backend: Tokenizer
    template: ChatTemplate
    has_own_template: bool
    bos: tuple[int, ...]  # what the tokenizer puts in front of a plain text by itself
    eos: tuple[int, ...]  # what ends a plain text, empty when the tokenizer has no such token
    eos_token: str
    digest: str

    def render(self, sample: Sample, loss_on: str) -> list[Rendered]:
        """The sequences of a sample: one, or chosen and rejected. Invalid when the template cannot print it."""
        match sample:
            case Text(text):
                return [Rendered(text, [(0, len(text))], whole=True)]
            case Pair(prompt, completion):
                text = prompt + completion
                return [Rendered(text, [(0 if loss_on == "All" else len(prompt), len(text))], whole=True)]
            case Conversation():
                return [self._render_conversation(sample, loss_on)]
            case Preference(chosen, rejected):
                return [*self.render(chosen, loss_on), *self.render(rejected, loss_on)]
            case Judged(answer, _):
                return self.render(answer, loss_on)

    def _render_conversation(self, sample: Conversation, loss_on: str) -> Rendered:
        sample = self.template.with_printed_calls(sample)
        if loss_on == "All":
            text = self.template.render(sample.messages, sample.tools)
            spans = [(0, len(text))]
        else:
            text, spans = self.template.spans(sample)
        if spans and not self.template.marks_turns and not self.template.ends_turn(text[: spans[-1][1]]):
            # the template never says that the turn is over: without this the model would not stop
            start, end = spans[-1]
            text = text[:end] + self.eos_token
            spans[-1] = (start, len(text))
        return Rendered(text, spans, whole=False)

    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Token ids and labels of many sequences at once (all cores)."""
        encodings = self.backend.encode_batch([one.text for one in rendered], add_special_tokens=False)
        return [self._tokens(one, encoding) for one, encoding in zip(rendered, encodings, strict=True)]

    def _tokens(self, rendered: Rendered, encoding: Encoding) -> Tokens:
        bos, eos = (self.bos, self.eos) if rendered.whole else ((), ())
        if bos and tuple(encoding.ids[: len(bos)]) == bos:
            bos = ()  # the text has it written out, as guanaco-llama2 and the like do
        if eos and tuple(encoding.ids[-len(eos) :]) == eos:
            eos = ()
        ids = np.array([*bos, *encoding.ids, *eos], dtype=np.int32)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        size = len(rendered.text)
        for start, end in rendered.spans:
            first = len(bos) + (0 if start == 0 else _token_at(encoding, start, size))
            last = len(ids) if end >= size else len(bos) + _token_at(encoding, end, size)
            labels[first:last] = ids[first:last]
        labels[:1] = IGNORE
        return Tokens(ids, labels)

    @property
    def special_tokens(self) -> list[str]:
        """Tokens that a text cannot hold as plain characters."""
        added = self.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=False))


def load_tokenizer(directory: Path) -> ModelTokenizer:
    """The tokenizer of a model's folder."""
    backend = _backend(directory)
    backend.no_truncation()
    backend.no_padding()
    config = _json(directory / "tokenizer_config.json") | _special_tokens(directory)
    tokens = {name: text for name in _SPECIAL if (text := _token_text(config.get(name)))}
    stops = _stops(directory, backend)
    if "eos_token" not in tokens and stops:
        tokens["eos_token"] = stops[0]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    eos_token = tokens.get("eos_token", "")
    if eos_token not in vocabulary:
        log.warning("base model: no eos_token is named that its tokenizer has, so answers are learned without an end")
    own = _own_template(directory, config)
    source = own or default_template(vocabulary)
    plain, wrapped = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    starts = next((i for i in range(len(wrapped)) if wrapped[i : i + len(plain)] == plain), 0)
    return ModelTokenizer(
        backend=backend,
        template=ChatTemplate(source, tokens, [token for token in (*_END_OF_TURN, *stops) if token in vocabulary]),
        has_own_template=own is not None,
        bos=tuple(wrapped[:starts]),
        eos=(vocabulary[eos_token],) if eos_token in vocabulary else (),
        eos_token=eos_token,
        digest="sha256:" + sha256_hex(canonical_json([backend.to_str(), source, tokens])),
    )


def _token_at(encoding: Encoding, char: int, size: int) -> int:
    """Index of the first token that covers a character at or behind `char`; blanks may belong to no token."""
    for place in range(char, size):
        token = encoding.char_to_token(place)
        if token is not None:
            return int(token)
    return len(encoding)


def _backend(directory: Path) -> Tokenizer:
    fast = directory / "tokenizer.json"
    if fast.is_file():
        try:
            return Tokenizer.from_file(str(fast))
        except Exception as error:  # the library raises bare Exception
            raise RunFailure(BASE_MODEL_NOT_FOUND, f"base model: tokenizer.json cannot be read ({error})") from error
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False).backend_tokenizer
    except Exception as error:
        raise RunFailure(
            BASE_MODEL_NOT_FOUND,
            f"base model: there is no tokenizer.json, and what else is there makes no fast tokenizer ({error}); add "
            "tokenizer.json",
        ) from error


def _own_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The model's chat template: chat_template.jinja, chat_template.json, or in tokenizer_config.json (newest "
    "first)."""
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    template = _json(directory / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def _stops(directory: Path, backend: Tokenizer) -> list[str]:
    """What the model's generation stops at: more than eos_token in GLM, whose turns end where the next one begins."""
    for name in ("generation_config.json", "config.json"):
        ends = _json(directory / name).get("eos_token_id")
        found = [
            backend.id_to_token(end) for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)
        ]
        if tokens := [str(token) for token in found if token]:
            return tokens
    return []


def _special_tokens(directory: Path) -> dict[str, Any]:
    return {name: value for name, value in _json(directory / "special_tokens_map.json").items() if name in _SPECIAL}


def _token_text(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunFailure(BASE_MODEL_NOT_FOUND, f"base model: {path.name} is not JSON ({error})") from error
    return value if isinstance(value, dict) else {}
