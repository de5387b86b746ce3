"""Rows into checked samples: recognises the format, normalises, and collects what is wrong with file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any, NamedTuple

from finetune_operator.api.dataset import Dataset
from finetune_trainer.data import rows
from finetune_trainer.data.formats import (
    BY_NAME,
    FORMATS_OF,
    Format,
    Invalid,
    Sample,
    describe,
    recognise,
    rename,
    with_synonyms,
)
from finetune_trainer.failures import INVALID_DATASET, RunFailure

SHOWN = 5  # bad rows that a message quotes; the rest is counted
_LOOKED_AT = 100  # rows among which one must show the format


@dataclass
class Problems:
    """The rows that cannot be used: the first few in words, all of them counted."""

    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, what: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{place}: {what}")

    def fail(self, checked: int) -> None:
        """Raise InvalidDataset if there is any."""
        if self.count:
            rows_are = "rows is" if self.count == 1 else "rows are"
            more = f"\n... and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
            raise RunFailure(
                INVALID_DATASET,
                f"{self.count} of {checked} {rows_are} invalid; correct them, or set dataset.onInvalidRow: Skip\n"
                + "\n".join(self.first)
                + more,
            )


class Checked(NamedTuple):
    """A sample and the row that it came from."""

    place: str
    sample: Sample


class Reading(NamedTuple):
    """A dataset that is being read: its format, and its samples as they come."""

    form: Format
    samples: Iterator[Checked]


def read_samples(files: list[rows.DataFile], dataset: Dataset, objective: str, problems: Problems) -> Reading:
    """Read files as `dataset` says. Bad rows go to `problems`; RunFailure when no row has a format that fits the
    objective.
    """
    columns: Mapping[str, str] = dataset.columns.model_dump(exclude_none=True)
    source = chain.from_iterable(rows.read(file) for file in files)
    beginning = list(islice(source, _LOOKED_AT))
    if not beginning:
        raise RunFailure(INVALID_DATASET, f"there are no rows in {', '.join(file.name for file in files[:SHOWN])}")
    form = _format(beginning, dataset.format, columns, objective)
    return Reading(form, _samples(chain(beginning, source), form, columns, problems))


def check_rows(files: list[rows.DataFile], dataset: Dataset, objective: str) -> None:
    """Read all rows without tokenizing them; InvalidDataset when one is bad and dataset.onInvalidRow is Fail."""
    problems = Problems()
    samples = read_samples(files, dataset, objective, problems).samples
    good = sum(1 for _ in islice(samples, dataset.max_samples))
    if dataset.on_invalid_row == "Fail":
        problems.fail(good + problems.count)


def _samples(
    source: Iterator[rows.Row], form: Format, columns: Mapping[str, str], problems: Problems
) -> Iterator[Checked]:
    unseen, value = dict(columns), None
    for row in source:
        if row.value is None:
            problems.add(row.place, row.problem)
            continue
        value = row.value
        if unseen:
            unseen = {own: theirs for own, theirs in unseen.items() if theirs not in value}
        try:
            yield Checked(row.place, form.read(with_synonyms(rename(value, columns), form)))
        except Invalid as invalid:
            problems.add(row.place, str(invalid))
    for own, theirs in unseen.items():  # an optional column would be missing without a word
        if value is not None:
            raise RunFailure(
                INVALID_DATASET,
                f"dataset.columns.{own}: no row has a column {theirs!r}; the last one has {', '.join(map(str, value))}",
            )


def _format(beginning: list[rows.Row], asked: str, columns: Mapping[str, str], objective: str) -> Format:
    if asked != "Auto":
        if asked not in FORMATS_OF[objective]:
            raise RunFailure(
                INVALID_DATASET,
                f"dataset.format: {asked} cannot be learned by objective.type: {objective}, which needs "
                f"{describe(objective)}",
            )
        return BY_NAME[asked]
    values = [row.value for row in beginning if row.value is not None]
    for value in values:
        if form := recognise(rename(value, columns), objective):
            return form
    if not values:
        bad = "\n".join(f"{row.place}: {row.problem}" for row in beginning[:SHOWN])
        raise RunFailure(
            INVALID_DATASET,
            f"none of the first {len(beginning)} rows can be read\n{bad}",
        )
    held = next((name for name, cell in values[0].items() if isinstance(cell, list) and _is_object(cell[:1])), None)
    if held is not None and len(beginning) == 1:
        raise RunFailure(
            INVALID_DATASET,
            f"{beginning[0].place}: the rows are inside {held!r} of one object: write them one per line, for example with "
            f"jq -c '.{held}[]'",
        )
    other = next((name for name in FORMATS_OF if recognise(rename(values[0], columns), name)), None)
    looks = f"; they look like rows for objective.type: {other}" if other else ""
    raise RunFailure(
        INVALID_DATASET,
        f"{beginning[0].place}: the rows' columns are {', '.join(map(str, values[0])) or 'none'}{looks}. "
        f"objective.type: {objective} needs {describe(objective)}. Name them so, or say with dataset.columns which "
        f"column is which{_near_names(values[0], objective)}",
    )


def _is_object(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values) and bool(values)


def _near_names(row: Mapping[str, Any], objective: str) -> str:
    """How the columns would be named for the format that is closest to them, when one is."""
    plain = {str(name).strip().lower(): str(name) for name in row}
    for form in (BY_NAME[name] for name in FORMATS_OF[objective]):
        near = {own: get_close_matches(own, plain, n=1, cutoff=0.75) for own in form.columns}
        if all(near.values()):
            asked = ", ".join(f"{own}: {plain[found[0]]}" for own, found in near.items() if plain[found[0]] != own)
            return f"; for {form.name}, dataset.columns: {{{asked}}}"
    return ""
