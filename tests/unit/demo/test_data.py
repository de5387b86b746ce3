"""The demo's data: checked in, and honest about what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from e2e.demo import make_data
from e2e.demo.__main__ import QUESTION


def read(name: str) -> list[Any]:
    return [json.loads(line) for line in (make_data.DATA / f"{name}.jsonl").read_text().splitlines()]


def questions(rows: list[Any]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


def test_the_checked_in_files_are_what_the_maker_writes() -> None:
    assert read("train") == make_data.training_rows()
    assert read("evaluation") == make_data.evaluation_rows()


def test_the_question_of_the_demo_was_never_trained_on() -> None:
    assert QUESTION in questions(read("evaluation"))
    assert not questions(read("evaluation")) & questions(read("train"))


def test_the_example_finetune_keeps_an_answer_to_that_question() -> None:
    example = Path("examples/finetune.yaml").read_text()
    assert QUESTION in example
