"""Where the answers of a prepared sample begin: behind what all its sequences have in common."""

import numpy as np
import pytest

from finetune_trainer.data.prepared import answers_begin
from finetune_trainer.data.tokenizer import IGNORE, Tokens


def sequence(ids: list[int], learned_from: int) -> Tokens:
    labels = np.array(ids, np.int32)
    labels[:learned_from] = IGNORE
    return Tokens(np.array(ids, np.int32), labels)


@pytest.mark.parametrize(
    ("chosen", "rejected", "begin"),
    [
        (sequence([1, 2, 3, 8], 3), sequence([1, 2, 3, 9, 9], 3), 3),
        # the answers share their first token, and still begin with it
        (sequence([1, 2, 3, 8], 2), sequence([1, 2, 3, 9], 2), 2),
        # 2 and the chosen answer's first characters became the token 7
        (sequence([1, 7, 8], 2), sequence([1, 2, 9, 9], 2), 1),
        (sequence([1, 2, 8], 2), sequence([1, 7, 9], 1), 1),
        # one is the beginning of the other
        (sequence([1, 2, 8], 2), sequence([1, 2, 8, 9], 2), 2),
    ],
)
def test_answers_begin_where_they_are_learned_or_part(chosen: Tokens, rejected: Tokens, begin: int) -> None:
    assert answers_begin([chosen, rejected]) == begin


def test_a_single_answer_begins_where_it_is_learned() -> None:
    assert answers_begin([sequence([1, 2, 8, 9], 2)]) == 2
