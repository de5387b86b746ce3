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

from finetune_trainer.tokenise import IGNORE, Tokens

_BUFFER = 8 << 20


class Spool:
    """Sequences in the order in which they were added; about 24 bytes of memory each, their tokens on disk."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._paths = (directory / "ids.bin", directory / "labels.bin")
        self._files = [open(path, "wb", buffering=_BUFFER) for path in self._paths]  # noqa: SIM115  # closed by close()
        self._lengths, self._learned, self._hashes = array("i"), array("i"), array("Q")

    def add(self, tokens: Tokens, content: int) -> None:
        """Append a sequence; `content` is the hash by which equal samples are known."""
        for file, values in zip(self._files, tokens, strict=True):
            file.write(values.tobytes())
        self._lengths.append(len(tokens.input_ids))
        self._learned.append(int(np.count_nonzero(tokens.labels != IGNORE)))
        self._hashes.append(content)

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
        return np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)

    @property
    def learned(self) -> np.ndarray:
        """Number of labels in each sequence that are learned."""
        return np.frombuffer(self._learned, dtype=np.int32) if self._learned else np.zeros(0, np.int32)

    @property
    def hashes(self) -> np.ndarray:
        return np.frombuffer(self._hashes, dtype=np.uint64) if self._hashes else np.zeros(0, np.uint64)

    def reader(self) -> SpoolReader:
        """Read access, once everything has been added."""
        self.close()
        return SpoolReader(self._paths, self.lengths)


class SpoolReader:
    """The sequences of a spool by their number, memory-mapped."""

    def __init__(self, paths: tuple[Path, Path], lengths: np.ndarray) -> None:
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        empty = self._starts[-1] == 0
        self._ids, self._labels = (
            np.zeros(0, np.int32) if empty else np.memmap(path, dtype=np.int32, mode="r") for path in paths
        )

    def gather(self, indices: Sequence[int]) -> Tokens:
        """The sequences `indices`, one after the other."""
        slices = [slice(self._starts[index], self._starts[index + 1]) for index in indices]
        return Tokens(*(np.concatenate([values[part] for part in slices]) for values in (self._ids, self._labels)))


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
