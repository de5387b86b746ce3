"""Tokenized samples on disk: one flat file of ids and one of labels, so that a dataset of any size is packed in bounded
memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from finetune_trainer.data.tokenizer import IGNORE, Tokens

_BUFFER = 8 << 20


class Spool:
    """Samples in the order in which they were added; about 24 bytes of memory each, their tokens on disk.

    A sample is one sequence, or two when there are two answers to compare: always the same number in one spool.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._paths = (directory / "ids.bin", directory / "labels.bin")
        self._files = [open(path, "wb", buffering=_BUFFER) for path in self._paths]  # noqa: SIM115  # closed by close()
        self._sequences, self._lengths, self._learned = array("i"), array("i"), array("i")
        self._hashes, self._good = array("Q"), array("b")

    def add(self, sequences: Sequence[Tokens], content: int, good: bool = True) -> None:
        """Append a sample. `content`: the hash by which equal samples are known. `good`: of a judged answer."""
        for tokens in sequences:
            for file, values in zip(self._files, tokens, strict=True):
                file.write(values.tobytes())
            self._sequences.append(len(tokens.input_ids))
        self._lengths.append(sum(len(tokens.input_ids) for tokens in sequences))
        self._learned.append(sum(int(np.count_nonzero(tokens.labels != IGNORE)) for tokens in sequences))
        self._hashes.append(content)
        self._good.append(good)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.array(self._lengths, dtype=np.int32)

    @property
    def learned(self) -> np.ndarray:
        """Learned tokens of each sample."""
        return np.array(self._learned, dtype=np.int32)

    @property
    def hashes(self) -> np.ndarray:
        return np.array(self._hashes, dtype=np.uint64)

    @property
    def good(self) -> np.ndarray:
        """Whether each judged answer is a good one."""
        return np.array(self._good, dtype=bool)

    def reader(self) -> SpoolReader:
        """Read access, once everything has been added."""
        self.close()
        per_sample = len(self._sequences) // len(self) if len(self) else 1
        return SpoolReader(self._paths, np.array(self._sequences, dtype=np.int32), per_sample)


class SpoolReader:
    """The samples of a spool by their number, memory-mapped."""

    def __init__(self, paths: tuple[Path, Path], lengths: np.ndarray, per_sample: int) -> None:
        self._starts, self._per_sample = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), per_sample
        empty = self._starts[-1] == 0
        self._ids, self._labels = (
            np.zeros(0, np.int32) if empty else np.memmap(path, dtype=np.int32, mode="r") for path in paths
        )

    def sequences(self, index: int) -> list[Tokens]:
        """The sequences of one sample."""
        first = index * self._per_sample
        return [self._tokens(slice(*self._starts[at : at + 2])) for at in range(first, first + self._per_sample)]

    def gather(self, indices: np.ndarray) -> Tokens:
        """The samples `indices`, one after the other."""
        chosen = indices * self._per_sample
        starts, ends = self._starts[chosen], self._starts[chosen + self._per_sample]
        sizes = ends - starts
        # place of each token: its number among all that are gathered, moved to where its sample begins
        places = np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
        return Tokens(self._ids[places], self._labels[places])

    @property
    def largest_id(self) -> int:
        return int(self._ids.max(initial=0))

    def _tokens(self, part: slice) -> Tokens:
        return Tokens(self._ids[part], self._labels[part])


def content_hash(texts: Sequence[str]) -> int:
    """64 bits of the texts of a sample, as rendered."""
    whole = hashlib.blake2b(digest_size=8)
    for text in texts:
        whole.update(text.encode(errors="surrogatepass"))
        whole.update(b"\0")
    return int.from_bytes(whole.digest(), "big")


def held_out(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which samples are held out (bool per sample): about `fraction` of them, at least one, by seed and content alone.

    Equal samples go to the same side, so that nothing that is evaluated was learned.
    """
    values, counts = np.unique(hashes, return_counts=True)
    if len(values) < 2:
        return np.zeros(len(hashes), bool)
    order = np.argsort(_mixed(values, seed), kind="stable")
    reached = np.searchsorted(np.cumsum(counts[order]), max(1, round(fraction * len(hashes))))
    chosen = values[order[: min(reached + 1, len(values) - 1)]]
    return np.isin(hashes, chosen)


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random 64-bit number for each value (splitmix64)."""
    mixed = values + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
