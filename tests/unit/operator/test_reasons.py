"""The table of reasons and the trainer's list of them agree."""

from finetune_operator.reasons import FAILURES, UNKNOWN, of_failure, with_hint
from finetune_trainer import failures


def test_every_reason_of_the_trainer_is_in_the_table() -> None:
    assert not failures.REASONS - FAILURES.keys()


def test_every_reason_that_fails_a_run_says_what_helps() -> None:
    assert not [name for name, row in FAILURES.items() if row.retry != "free" and not row.hint]


def test_reasons_are_camel_case_as_conditions_want_them() -> None:
    assert all(name[0].isupper() and name.isalnum() for name in FAILURES)


def test_a_reason_of_a_newer_trainer_is_tried_again() -> None:
    assert of_failure("FromTheFuture") is UNKNOWN


def test_a_hint_is_added_once() -> None:
    once = with_hint("it broke.", "mend it")
    assert once == "it broke. Fix: mend it."
    assert with_hint(once, "mend it") == once
