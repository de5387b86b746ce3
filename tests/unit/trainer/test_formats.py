"""Every format with good rows and bad ones, and the words in which bad ones are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api.dataset import Dataset
from finetune_trainer.data.check import Problems, read_samples
from finetune_trainer.data.formats import Conversation, Judged, Pair, Preference, Sample, Text
from finetune_trainer.data.rows import DataFile
from finetune_trainer.failures import RunFailure

U, A, S = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def check(
    tmp_path: Path, rows: list[Any], objective: str = "SFT", **dataset: Any
) -> tuple[str, list[Sample], Problems]:
    path = tmp_path / "rows"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = Dataset.model_validate({"train": {"s3": {"uri": "s3://data/rows"}}, **dataset})
    problems = Problems()
    reading = read_samples([DataFile(path, "rows.jsonl")], spec, objective, problems)
    return reading.form.name, [checked.sample for checked in reading.samples], problems


DOLLY = {"instruction": "add", "context": "1 and 2", "response": "3", "category": "qa"}
# OpenAI writes arguments as JSON in a text; templates are made for the object, which vLLM gives them too
CALLING = {
    "role": A, "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
}  # fmt: skip
CALLED = {
    "role": A, "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
}  # fmt: skip
GOOD: list[tuple[str, dict[str, Any], Sample]] = [
    ("Text", {"text": "alpha", "source": "web"}, Text("alpha")),
    ("Messages", {"messages": turns((U, "a"), (A, "b"))}, Conversation(turns((U, "a"), (A, "b")))),
    (
        "Messages",
        {"messages": turns((S, "s"), (U, "a"), (A, "b"), (U, "c"), (A, "d")), "prompt": "a"},
        Conversation(turns((S, "s"), (U, "a"), (A, "b"), (U, "c"), (A, "d"))),
    ),
    ("Messages", {"messages": json.dumps(turns((U, "a"), (A, "b")))}, Conversation(turns((U, "a"), (A, "b")))),
    (
        "Messages",
        {"messages": [{"role": "User", "content": [{"type": "text", "text": "a"}]}, {"role": "model", "content": "b"}]},
        Conversation(turns((U, "a"), (A, "b"))),
    ),
    ("PromptCompletion", {"prompt": "a", "completion": " b"}, Pair("a", " b")),
    (
        "PromptCompletion",
        {"prompt": turns((U, "a")), "completion": turns((A, "b"))},
        Conversation(turns((U, "a"), (A, "b")), learn_from=1),
    ),
    (
        "PromptCompletion",
        {"system": "s", "prompt": "a", "completion": "b"},
        Conversation(turns((S, "s"), (U, "a"), (A, "b"))),
    ),
    (
        "Alpaca",
        {"instruction": "add", "input": "1 and 2", "output": "3"},
        Conversation(turns((U, "add\n\n1 and 2"), (A, "3"))),
    ),
    ("Alpaca", {"instruction": "add", "input": "", "output": "3"}, Conversation(turns((U, "add"), (A, "3")))),
    ("Alpaca", DOLLY, Conversation(turns((U, "add\n\n1 and 2"), (A, "3")))),
    (
        "ShareGPT",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        Conversation(turns((S, "s"), (U, "a"), (A, "b"))),
    ),
    # LLaMA-Factory's earlier turns
    (
        "Alpaca",
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
        Conversation(turns((U, "a"), (A, "b"), (U, "c"), (A, "d"))),
    ),
    # OpenAI's weight: 0 is context that is not learned
    (
        "Messages",
        {
            "messages": [
                {"role": U, "content": "a"},
                {"role": A, "content": "b", "weight": 0},
                *turns((U, "c"), (A, "d")),
            ]
        },
        Conversation(turns((U, "a"), (A, "b"), (U, "c"), (A, "d")), skipped=frozenset({1})),
    ),
    # what a tool answers, and a system message, may be empty
    (
        "Messages",
        {"messages": [*turns((S, ""), (U, "a")), CALLING, *turns(("tool", ""), (A, "b"))]},
        Conversation([*turns((S, ""), (U, "a")), CALLED, *turns(("tool", ""), (A, "b"))]),
    ),
    # a row with a system column is a conversation, also where that is empty: other rows of the file have one
    (
        "PromptCompletion",
        {"prompt": "a", "completion": "b", "system": ""},
        Conversation(turns((U, "a"), (A, "b"))),
    ),
]


@pytest.mark.parametrize(("form", "row", "sample"), GOOD, ids=[f"{form}-{n}" for n, (form, _, _) in enumerate(GOOD)])
def test_a_format_is_recognised_and_normalised(tmp_path: Path, form: str, row: dict[str, Any], sample: Sample) -> None:
    assert check(tmp_path, [row]) == (form, [sample], Problems())
    assert check(tmp_path, [row], format=form) == (form, [sample], Problems())


def test_columns_rename_what_the_dataset_calls_otherwise(tmp_path: Path) -> None:
    row = {"question": "a", "text": "ignored", "reply": "b"}
    form, samples, _ = check(tmp_path, [row], columns={"instruction": "question", "output": "reply"})
    assert (form, samples) == ("Alpaca", [Conversation(turns((U, "a"), (A, "b")))])
    _, samples, _ = check(tmp_path, [DOLLY], columns={"input": "context", "output": "response"})
    assert samples == [Conversation(turns((U, "add\n\n1 and 2"), (A, "3")))]


def test_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    rows = [DOLLY, DOLLY | {"note": "x"}]
    with pytest.raises(
        RunFailure, match=r"dataset.columns.input: no row has a column 'contxt'; the last one has instr"
    ):
        check(tmp_path, rows, columns={"input": "contxt", "output": "response"})
    assert len(check(tmp_path, rows, columns={"system": "note", "output": "response"})[1]) == 2  # some rows have it


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"text": "x"}, {"text": "  "}, "text is empty"),
    ({"text": "x"}, {"text": 3}, "text is 3: text is needed"),
    ({"text": "x"}, {"txt": "y"}, "has no 'text'; its columns are txt"),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "completion is null: text is needed"),
    ({"instruction": "a", "output": "b"}, {"instruction": "a"}, "has no 'output'; its columns are instruction"),
    ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}, "output is empty"),
]
GOOD_MESSAGES = {"messages": turns((U, "a"), (A, "b"))}
BAD_MESSAGES: list[tuple[Any, str]] = [
    ([], "messages is empty"),
    ("hello", 'messages is "hello": a list of messages is needed'),
    (["hello"], 'messages[0] is "hello": an object with role and content is needed'),
    ([{"content": "a"}], "messages[0] has no role: use system, user, assistant or tool"),
    (turns((U, "a"), ("boss", "b")), 'messages[1].role is "boss": use system, user, assistant or tool'),
    ([{"role": U, "content": "a"}, {"role": A}], "messages[1].content is null: text is needed"),
    (turns((U, "a"), (A, " ")), "messages[1].content is empty"),
    (turns((U, "a")), "messages ends with a user turn: the last turn must be the assistant's, it is what is learned"),
    (turns((A, "a")), "messages begins with a turn of assistant: the first turn after system must be the user's"),
    (
        turns((U, "a"), (U, "b"), (A, "c")),
        "messages[1] is a turn of user after user: user and assistant must take turns, system comes first",
    ),
    (
        turns((U, "a"), (A, "b"), (S, "c"), (A, "d")),
        "messages[2] is a turn of system after assistant: user and assistant must take turns, system comes first",
    ),
    (
        [{"role": U, "content": [{"type": "image_url"}]}, {"role": A, "content": "b"}],
        "messages[0].content has parts that are not text: only text can be learned",
    ),
]
BAD_MESSAGES += [
    (
        [{"role": U, "content": "a"}, {"role": A, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        (
            "messages[1].tool_calls[0].function.arguments is text that is not JSON (Expecting property name enclosed in "
            "double quotes: line 1 column 2 (char 1))"
        ),
    ),
    (
        [{"role": U, "content": "a"}, {"role": A, "content": "b", "weight": 0.5}],
        "messages[1].weight is 0.5: use 0 (not learned) or 1",
    ),
]
BAD += [
    (
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history[0] is a list: a list of two texts, question and answer, is needed",
    )
]
BAD += [(GOOD_MESSAGES, {"messages": value}, message) for value, message in BAD_MESSAGES]


@pytest.mark.parametrize(("good", "bad", "message"), BAD, ids=[message for _, _, message in BAD])
def test_a_bad_row_is_refused_with_its_place_and_what_to_write(
    tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], message: str
) -> None:
    _, samples, problems = check(tmp_path, [good, bad, good])
    assert len(samples) == 2
    assert problems.first == [f"rows.jsonl:2: {message}"]


def test_many_bad_rows_are_counted_and_the_first_are_quoted(tmp_path: Path) -> None:
    _, samples, problems = check(tmp_path, [{"text": "good"}, *[{"text": ""}] * 8])
    assert len(samples) == 1
    with pytest.raises(RunFailure) as caught:
        problems.fail(9)
    assert (
        caught.value.message.splitlines()[0]
        == "8 of 9 rows are invalid; correct them, or set dataset.onInvalidRow: Skip"
    )
    assert caught.value.message.splitlines()[-1] == "... and 3 more"


def test_one_bad_row_is_one_of_all_rows(tmp_path: Path) -> None:
    with pytest.raises(RunFailure, match="^1 of 2 rows is invalid; "):
        check(tmp_path, [{"text": "good"}, {"text": ""}])[2].fail(2)


def test_rows_of_no_known_format_are_refused_with_the_formats(tmp_path: Path) -> None:
    with pytest.raises(RunFailure) as caught:
        check(tmp_path, [{"q": "a", "a": "b"}])
    assert caught.value.message == (
        "rows.jsonl:1: the rows' columns are q, a. objective.type: SFT needs Messages {messages}; ShareGPT "
        "{conversations}; "
        "Alpaca {instruction, output}; PromptCompletion {prompt, completion}; Text {text}. "
        "Name them so, or say with dataset.columns which column is which"
    )


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"promt": "a", "completions": "b"},
            "PromptCompletion, dataset.columns: {prompt: promt, completion: completions}",
        ),
        ({"Instruction": "a", "Output": "b"}, "Alpaca, dataset.columns: {instruction: Instruction, output: Output}"),
        ({"message": []}, "Messages, dataset.columns: {messages: message}"),
    ],
)
def test_columns_that_are_nearly_right_are_named(tmp_path: Path, row: dict[str, Any], hint: str) -> None:
    with pytest.raises(RunFailure) as caught:
        check(tmp_path, [row])
    assert caught.value.message.endswith(f"which column is which; for {hint}")


def test_rows_inside_one_object_are_said_with_how_to_get_them_out(tmp_path: Path) -> None:
    with pytest.raises(
        RunFailure, match=r"rows.jsonl:1: the rows are inside 'data' of one object: .* jq -c '.data\[\]'"
    ):
        check(tmp_path, [{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}])


def test_a_file_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("[]")
    spec = Dataset.model_validate({"train": {"s3": {"uri": "s3://data/rows"}}})
    with pytest.raises(RunFailure, match="^there are no rows in a.json, b.json$"):
        read_samples([DataFile(tmp_path / "rows", name) for name in ("a.json", "b.json")], spec, "SFT", Problems())


def test_rows_for_another_objective_are_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(
        RunFailure, match=r"columns are chosen, rejected; they look like rows for objective.type: DPO\."
    ):
        check(tmp_path, [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(RunFailure, match="dataset.format: Preference cannot be learned by objective.type: SFT"):
        check(tmp_path, [{"chosen": "a", "rejected": "b"}], format="Preference")


PREFERENCES: list[tuple[dict[str, Any], Sample]] = [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference(Pair("a", "b"), Pair("a", "c"))),
    (
        {"chosen": turns((U, "a"), (A, "b")), "rejected": turns((U, "a"), (A, "c"))},
        Preference(
            Conversation(turns((U, "a"), (A, "b")), learn_from=1), Conversation(turns((U, "a"), (A, "c")), learn_from=1)
        ),
    ),
    # hh-rlhf: whole texts that begin alike
    (
        {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"},
        Preference(Pair("Human: a\n\nAssistant:", " b"), Pair("Human: a\n\nAssistant:", " c")),
    ),
    # ultrafeedback: a prompt, and conversations that repeat it
    (
        {"prompt": "a", "chosen": turns((U, "a"), (A, "b")), "rejected": turns((U, "a"), (A, "c"))},
        Preference(
            Conversation(turns((U, "a"), (A, "b")), learn_from=1), Conversation(turns((U, "a"), (A, "c")), learn_from=1)
        ),
    ),
    # LLaMA-Factory's demo: turns, and one message for each answer
    (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        Preference(
            Conversation(turns((U, "a"), (A, "b")), learn_from=1), Conversation(turns((U, "a"), (A, "c")), learn_from=1)
        ),
    ),
    (
        {"prompt": "a", "chosen": turns((A, "b")), "rejected": turns((A, "c"))},
        Preference(
            Conversation(turns((U, "a"), (A, "b")), learn_from=1), Conversation(turns((U, "a"), (A, "c")), learn_from=1)
        ),
    ),
]


@pytest.mark.parametrize(("row", "sample"), PREFERENCES)
def test_preferences_come_as_text_or_as_messages(tmp_path: Path, row: dict[str, Any], sample: Sample) -> None:
    assert check(tmp_path, [row], objective="DPO") == ("Preference", [sample], Problems())


def test_equal_answers_are_no_preference(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "b"}
    assert check(tmp_path, [row], objective="ORPO")[2].first == [
        "rows.jsonl:1: chosen and rejected are the same: there is nothing to prefer"
    ]


def test_whole_texts_that_begin_differently_have_no_prompt(tmp_path: Path) -> None:
    assert check(tmp_path, [{"chosen": "b", "rejected": "c"}], objective="DPO")[2].first == [
        "rows.jsonl:1: has no 'prompt', and chosen and rejected begin with different texts: add a prompt"
    ]


@pytest.mark.parametrize(("label", "expected"), [(True, True), (0, False), ("true", True), ("0", False)])
def test_judged_answers_carry_a_label(tmp_path: Path, label: Any, expected: bool) -> None:
    row = {"prompt": "a", "completion": "b", "label": label}
    assert check(tmp_path, [row], objective="KTO")[:2] == ("UnpairedPreference", [Judged(Pair("a", "b"), expected)])


def test_a_label_that_says_nothing_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": "good"}]
    assert check(tmp_path, rows, objective="KTO")[2].first == [
        'rows.jsonl:1: label is "good": write true for a good answer, false for a bad one'
    ]
