"""What rows may hold and people seldom mean: told with the first place of each, never refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

from finetune_trainer.data.formats import Conversation, Judged, Preference, Sample

log = logging.getLogger(__name__)

_UNPRINTED = "a system message that the base model's chat template does not print: it is not part of what is learned"
_SPECIAL = "special tokens of the base model in a message, which end turns or begin new ones there as in the template"


class Notices:
    """Counts what is worth telling while samples pass by."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._found: dict[str, tuple[int, str]] = {}

    def look(self, place: str, sample: Sample, texts: list[str]) -> None:
        """`texts`: what each sequence of the sample was rendered to."""
        for conversation, text in zip(_conversations(sample), texts, strict=False):
            first = conversation.messages[0]
            if first["role"] == "system" and first["content"].strip() not in text:
                self._add(_UNPRINTED, place)
            for message in conversation.messages:
                if self._special and (special := self._special.search(message["content"])):
                    self._add(_SPECIAL, f"{place}, {special.group()}")
                    break
            return  # two answers to one prompt are one row

    def tell(self) -> None:
        """Say what was found."""
        for what, (count, place) in self._found.items():
            log.warning("dataset: %d rows have %s (the first: %s)", count, what, place)

    def _add(self, what: str, place: str) -> None:
        count, first = self._found.get(what, (0, place))
        self._found[what] = count + 1, first


def _conversations(sample: Sample) -> Iterator[Conversation]:
    answers = (sample.chosen, sample.rejected) if isinstance(sample, Preference) else (sample,)
    for answer in answers:
        part = answer.answer if isinstance(answer, Judged) else answer
        if isinstance(part, Conversation):
            yield part
