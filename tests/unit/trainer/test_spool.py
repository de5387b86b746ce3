"""Tokenized samples on disk, and which of them are held out."""

from pathlib import Path

import numpy as np
import pytest

from finetune_trainer.data.spool import Spool, content_hash, held_out
from finetune_trainer.data.tokenizer import IGNORE, Tokens


def test_sequences_come_back_in_any_order(tmp_path: Path) -> None:
    made = [Tokens(np.arange(n, dtype=np.int32), np.full(n, IGNORE, np.int32)) for n in (3, 1, 4)]
    made[2].labels[2:] = made[2].input_ids[2:]
    with Spool(tmp_path) as spool:
        for number, tokens in enumerate(made):
            spool.add([tokens], number)
    assert spool.lengths.tolist() == [3, 1, 4]
    assert spool.learned.tolist() == [0, 0, 2]
    ids, labels = spool.reader().gather(np.array([2, 0]))
    assert ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert labels.tolist() == [IGNORE, IGNORE, 2, 3, IGNORE, IGNORE, IGNORE]


def test_the_content_hash_knows_where_texts_end() -> None:
    assert content_hash(["ab", "c"]) != content_hash(["a", "bc"])
    assert content_hash(["ab"]) == content_hash(["ab"])


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_fraction_is_held_out_by_seed_and_content(fraction: float) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 5000).astype(np.uint64)
    chosen = held_out(hashes, fraction, seed=1)
    assert chosen.sum() == round(5000 * fraction)
    assert (held_out(hashes, fraction, seed=1) == chosen).all()
    assert (held_out(hashes, fraction, seed=2) != chosen).any()
    shuffled = np.random.default_rng(1).permutation(5000)
    assert (held_out(hashes[shuffled], fraction, seed=1) == chosen[shuffled]).all()


def test_equal_samples_go_to_the_same_side() -> None:
    hashes = np.repeat(np.arange(100, dtype=np.uint64), 3)
    chosen = held_out(hashes, 0.2, seed=0)
    assert set(hashes[chosen]).isdisjoint(hashes[~chosen])


def test_at_least_one_sample_is_held_out_and_one_is_left() -> None:
    assert held_out(np.array([1, 2], np.uint64), 0.01, seed=0).sum() == 1
    assert held_out(np.array([7, 7], np.uint64), 0.5, seed=0).sum() == 0
