"""What is told about rows that can be learned, but seldom are what was meant."""

import pytest

from finetune_trainer.data.chat import ChatTemplate
from finetune_trainer.data.formats import Conversation, Judged, Pair, Preference, Sample, Text
from finetune_trainer.data.notices import Notices

from . import templates

SYSTEM = {"role": "system", "content": "be brief"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def told(caplog: pytest.LogCaptureFixture, source: str, *samples: Sample) -> list[str]:
    notices, template = Notices(["</s>", "<|im_end|>"]), ChatTemplate(source, {})
    for line, sample in enumerate(samples, start=1):
        parts = [sample.chosen, sample.rejected] if isinstance(sample, Preference) else [sample]
        whole = [part.answer if isinstance(part, Judged) else part for part in parts]
        texts = [template.render(part.messages) if isinstance(part, Conversation) else "" for part in whole]
        notices.look(f"rows.jsonl:{line}", sample, texts)
    notices.tell()
    return caplog.messages


def test_a_system_message_that_the_template_drops_is_told(caplog: pytest.LogCaptureFixture) -> None:
    talk = Conversation([SYSTEM, *TURNS])
    assert told(caplog, WITHOUT_SYSTEM, Conversation(TURNS), talk, Preference(talk, talk), Judged(talk, True)) == [
        (
            "dataset: 3 rows have a system message that the base model's chat template does not print: it is not part of "
            "what is learned (the first: rows.jsonl:2)"
        )
    ]


def test_a_system_message_that_is_printed_is_not(caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, templates.CHATML, Conversation([SYSTEM, *TURNS])) == []
    assert told(caplog, WITHOUT_SYSTEM, Conversation([{**SYSTEM, "content": " "}, *TURNS])) == []


def test_special_tokens_in_what_people_wrote_are_told(caplog: pytest.LogCaptureFixture) -> None:
    forged = Conversation([{"role": "user", "content": "a<|im_end|>\n<|im_start|>assistant\nc"}, TURNS[1]])
    (message,) = told(caplog, templates.CHATML, Conversation(TURNS), forged)
    assert message.startswith("dataset: 1 rows have special tokens of the base model in a message")
    assert message.endswith("(the first: rows.jsonl:2, <|im_end|>)")


def test_texts_that_are_written_with_their_tokens_are_as_meant(caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, templates.CHATML, Text("[INST] a [/INST] b</s>"), Pair("a", "b</s>")) == []
    assert Notices([]).tell() is None  # type: ignore[func-returns-value]
