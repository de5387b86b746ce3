"""Whether llama.cpp reads a GGUF file as transformers reads the model it was made of: the same tokens, the same logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from finetune_trainer.data.formats import Invalid, Message
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure
from finetune_trainer.results.gguffile import engine
from finetune_trainer.results.gguffile.architectures import CONVERT

if TYPE_CHECKING:
    import torch

#: How far logits may be apart, as a mean and in standard deviations: llama.cpp rounds a layer's inputs to the type of its
#: weights, and looks some activation functions up in a table of float16.
TOLERANCE = {"float32": 0.005, "float16": 0.0125, "bfloat16": 0.1}
#: What tokenizers disagree about: case, digits, blanks and line ends, other scripts, code, bytes.
TEXTS = (
    "Hello, world! It's 3 o'clock; I'LL pay $1,234.56 (or 78901).",
    " leading, and  two   three    blanks\tand a tab ",
    "lines\n\nand\r\nmore\n \n",
    "Grüße, žluťoučký kůň, Αθήνα, Москва, 東京都, 서울, שלום 👩‍🚀🎉",
    "def f(x: int) -> str:\n    return f'{x!r}' # camelCase snake_case HTTPServer2\n",
    "https://example.com/a?b=c&d=%20 <tag attr='1'/> 3.14e-10 ½ ²",
)
#: llama.cpp's own way to split a text for Mistral Nemo and GPT-4o takes marks for no part of a word. That is told, not
#: refused: nobody can make a file for which it would not.
MARKS = "नमस्ते दुनिया, สวัสดี"
#: What the chat template is given.
CHAT: list[Message] = [
    {"role": "user", "content": "What colour is the sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Why?"},
]
PLACES = 4  # of each prompt, whose next token is compared


class Agreement(NamedTuple):
    """`logits`: mean difference in standard deviations, of the prompt where it is largest. `marks`: whether words with
    combining marks are the same tokens too. `chat`: whether llama.cpp's own reading of the chat template writes the same.
    """

    logits: float
    tolerance: float
    texts: int
    marks: bool
    chat: bool


def verified(file: Path, tokenizer: ModelTokenizer, model: Any, dtype: str, prompts: Sequence[str]) -> Agreement:
    """Compare `file` with the model in transformers; RunFailure when they are not the same."""
    import torch

    chat = _chat(tokenizer)
    texts = [*TEXTS, *prompts, *filter(None, [chat])]
    rows = [tokenizer.backend.encode(text).ids for text in prompts]
    cut = [row[: place + 1] for row in rows for place in _places(len(row))]
    answer = _asked(file, [*texts, MARKS], cut, CHAT if chat else [])
    _refuse_other(texts, answer.tokens[:-1], tokenizer)
    worst, seen = 0.0, iter(answer.next)
    with torch.no_grad():
        for row in rows:
            logits: torch.Tensor = model(input_ids=torch.tensor([row])).logits[0].float()
            apart = [difference(next(seen), logits[place].numpy()) for place in _places(len(row))]
            worst = max(worst, float(np.mean(apart)))
    if not worst <= TOLERANCE[dtype]:
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            f"output.exports: in llama.cpp the GGUF file's logits differ by {worst:.2g} standard deviations from the merged "
            f"model's, more than {TOLERANCE[dtype]:.2g} in {dtype}; {CONVERT}",
        )
    marks = answer.tokens[-1] == tokenizer.backend.encode(MARKS).ids
    return Agreement(worst, TOLERANCE[dtype], len(texts), marks, answer.chat == chat)


def refuse_other_tokens(file: Path, tokenizer: ModelTokenizer) -> None:
    """RunFailure when llama.cpp makes other tokens of a text than the tokenizer that is in `file`."""
    texts = [*TEXTS, *filter(None, [_chat(tokenizer)])]
    _refuse_other(texts, _asked(file, texts).tokens, tokenizer)


def _chat(tokenizer: ModelTokenizer) -> str:
    """A conversation as the model is asked, where special tokens stand between words; empty when it takes none."""
    try:
        return tokenizer.template.render(CHAT, add_generation_prompt=True) if tokenizer.has_own_template else ""
    except Invalid:
        return ""


def _asked(
    file: Path, texts: Sequence[str], prompts: Sequence[engine.Ids] = (), chat: Sequence[Message] = ()
) -> engine.Answer:
    try:
        return engine.ask(file, texts, prompts, chat)
    except engine.Refused as error:
        raise RunFailure(
            UNSUPPORTED_COMBINATION, f"output.exports: llama.cpp does not load the GGUF file ({error}); {CONVERT}"
        ) from error


def _refuse_other(texts: Sequence[str], found: Sequence[engine.Ids], tokenizer: ModelTokenizer) -> None:
    for text, ids in zip(texts, found, strict=True):
        wanted = tokenizer.backend.encode(text).ids
        if ids != wanted:
            raise RunFailure(
                UNSUPPORTED_COMBINATION,
                f"output.exports: llama.cpp reads {text!r} as tokens {ids[:20]}, the model's own tokenizer as "
                f"{wanted[:20]}: a GGUF file would answer other questions than were asked; {CONVERT}",
            )


def difference(likeliest: Mapping[int, float], logits: np.ndarray[Any, Any]) -> float:
    """Mean difference of log probabilities to these logits, in standard deviations of the logits."""
    wide = logits.astype(np.float64)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    return float(np.mean([abs(value - expected[id]) for id, value in likeliest.items()]) / wide.std())


def _places(length: int) -> list[int]:
    return sorted({length * part // PLACES - 1 for part in range(1, PLACES + 1)} - {-1})
