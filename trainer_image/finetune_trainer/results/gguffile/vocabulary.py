"""A tokenizer as llama.cpp has it: tokens, their kinds, merges or scores, and by which rule a text is split before.

A tokenizer that splits texts in a way that llama.cpp does not know is refused: its file would load, and read other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gguf import GGUFWriter, SpecialVocab, TokenType

from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.results.gguffile.architectures import CONVERT

Node = Mapping[str, Any]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
#: llama.cpp's name for each way to split a text (src/llama-vocab.cpp): the patterns in the order in which they are used.
SPLITS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    (r"\p{N}", GPT2): "smollm",
    (LLAMA3,): "llama-bpe",
    (_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,): "qwen2",
    (
        _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "qwen35",
    (_CASED % ("", "", r"\p{N}"),): "tekken",
    (_CASED % (_ENDINGS + "?", _ENDINGS + "?", r"\p{N}{1,3}"),): "gpt-4o",
}
# Tokens without which llama.cpp loads no model that is called phi-3.
_PHI3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
SPACE = "\u2581"


class Unknown(ValueError):
    """llama.cpp has no such tokenizer; the text says what it has not."""


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file, beside the ids of the special tokens."""

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool
    #: Whether blanks and line ends behind a special token belong to it.
    strips: bool

    def describe(self, writer: GGUFWriter, name: str) -> None:
        # llama.cpp strips behind special tokens in models of this name and in no other (src/llama-vocab.cpp).
        writer.add_name(f"{name} (phi-3)" if self.strips else name)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)


def refusal(tokenizer: ModelTokenizer) -> str:
    """Why llama.cpp cannot have this tokenizer; empty when it can."""
    try:
        vocabulary_of(tokenizer, rows_of(tokenizer))
    except Unknown as error:
        return f"output.exports: GGUF is not made with this tokenizer: llama.cpp has {error}; {CONVERT}"
    return ""


def rows_of(tokenizer: ModelTokenizer) -> int:
    """Rows of the smallest embedding for this tokenizer."""
    return 1 + max(tokenizer.backend.get_vocab(with_added_tokens=True).values())


def vocabulary_of(tokenizer: ModelTokenizer, rows: int) -> Vocabulary:
    """`rows`: of the embedding; it may have more than there are tokens, or less: Gemma's texts know no image token."""
    whole = json.loads(tokenizer.backend.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise Unknown(f"no tokenizer of type {model['type']} for these models, only BPE")
    vocabulary: dict[str, int] = {text: id for text, id in model["vocab"].items() if id < rows}
    added = {int(token["id"]): token for token in whole["added_tokens"] if token["id"] < rows}
    of_bytes = bool(model.get("byte_fallback"))
    tokens = [f"[PAD{id}]" for id in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for text, id in vocabulary.items():
        tokens[id], types[id] = text, int(_type(text, of_bytes, model.get("unk_token")))
    for id, token in added.items():
        if types[id] != TokenType.UNKNOWN:
            types[id] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
        # Found in a text before it is split into words, and compared with the text as it is.
        tokens[id] = token["content"].replace(SPACE, " ") if of_bytes and not token["special"] else token["content"]
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    strips = any(token["rstrip"] for token in added.values()) and set(tokens) >= _PHI3
    if of_bytes:
        prefix, scores = _space_prefix(whole), _scores(vocabulary, merges, rows)
        return Vocabulary("llama", "default", tokens, types, [], scores, prefix, strips)
    return Vocabulary("gpt2", _pre(whole, model), tokens, types, [*map(" ".join, merges)], [], False, strips)


def special_tokens(folder: Path, tokenizer: ModelTokenizer, rows: int) -> SpecialVocab:
    """Ids of the special tokens, which of them are put around a text, and the chat template."""
    special = SpecialVocab(folder, load_merges=False, n_vocab=rows)
    for name, ids in (("bos", tokenizer.bos), ("eos", tokenizer.eos)):
        if ids:
            special.special_token_ids.setdefault(name, ids[0])
    # What it really puts around a text; the library reads that off the post-processor, and only simple ones.
    special.add_special_token = {"bos": bool(tokenizer.bos), "eos": _ends_texts(tokenizer)}
    special.chat_template = tokenizer.template.source if tokenizer.has_own_template else None
    return special


def _ends_texts(tokenizer: ModelTokenizer) -> bool:
    plain = tokenizer.backend.encode("a", add_special_tokens=False).ids
    return tokenizer.backend.encode("a").ids[len(tokenizer.bos) + len(plain) :] != []


def _type(text: str, of_bytes: bool, unknown: str | None) -> TokenType:
    if not of_bytes:
        return TokenType.NORMAL
    if text == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else TokenType.NORMAL


def _scores(vocabulary: Mapping[str, int], merges: list[tuple[str, ...]], rows: int) -> list[float]:
    """SentencePiece merges the pair with the highest score; tokenizer.json has its pairs in that order."""
    scores = [-1e6] * rows
    for place, (left, right) in reversed(list(enumerate(merges))):
        if (id := vocabulary.get(left + right)) is not None:
            scores[id] = -float(place)
    return scores


def _pre(whole: Node, model: Node) -> str:
    """Which of llama.cpp's ways to split a text this tokenizer's is."""
    normalizers = {node["type"] for node in _steps(whole.get("normalizer"), "normalizers")}
    if normalizers - {"NFC"}:  # llama.cpp does not compose characters; texts come composed
        raise Unknown(f"no normalizer {', '.join(sorted(normalizers))} before BPE")
    patterns: list[str] = []
    for node in _steps(whole.get("pre_tokenizer"), "pretokenizers"):
        patterns += _patterns(node)
    name = SPLITS.get(tuple(patterns))
    if name is None:
        raise Unknown(f"no name for this way to split a text: {' then '.join(patterns) or 'none'}")
    if name == "llama-bpe" and not model.get("ignore_merges"):
        return "dbrx"  # splits alike, but makes even a word that is a token out of merges
    return name


def _patterns(node: Node) -> list[str]:
    kind = node["type"]
    if kind == "ByteLevel":
        if node.get("add_prefix_space"):
            raise Unknown("no ByteLevel pre-tokenizer with add_prefix_space")
        return [GPT2] if node.get("use_regex", True) else []
    if kind == "Digits" and node.get("individual_digits"):
        return [r"\p{N}"]
    if kind == "Split" and (node["behavior"], node["invert"]) in (("Isolated", False), ("Removed", True)):
        return [node["pattern"].get("Regex", "")]
    raise Unknown(f"no pre-tokenizer {kind} before BPE")


def _space_prefix(whole: Node) -> bool:
    """Whether a text gets a blank in front, as SentencePiece's do by default."""
    prefix = False
    for node in _steps(whole.get("normalizer"), "normalizers"):
        if node["type"] == "Prepend":
            prefix = True
        elif not (node["type"] == "Replace" and node["content"] == SPACE):
            raise Unknown(f"no normalizer {node['type']} before SentencePiece's BPE")
    for node in _steps(whole.get("pre_tokenizer"), "pretokenizers"):
        if node["type"] == "Metaspace":
            prefix = node.get("prepend_scheme", "always") != "never"
        elif not (node["type"] == "Split" and node["behavior"] == "MergedWithPrevious"):
            raise Unknown(f"no pre-tokenizer {node['type']} before SentencePiece's BPE")
    return prefix


def _steps(node: Node | None, field: str) -> list[Node]:
    if node is None:
        return []
    return list(node[field]) if node["type"] == "Sequence" else [node]
