"""Chat templates: messages into text, and which stretches of that text the assistant wrote.

Renders as transformers' apply_chat_template does (a test compares them), without importing it: that costs seconds at
start-up. Templates come with models and are not trusted: they run in jinja2's sandbox, and the date is fixed, since a
template that prints today's date would give the same data another digest every day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_trainer.data.formats import Conversation, Invalid, Message

Span = tuple[int, int]
"""Start and end in characters of the rendered text."""

TODAY = datetime(2024, 7, 26)  # what Llama's templates print when no date is given

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# For base models whose vocabulary has no chat tokens: plain words only, so that no embedding has to be added and
# trained.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] "
    "}}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: the tag with which a template marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's interface

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = jinja2.nodes.Name(_MARKS, "load")
        return jinja2.nodes.CallBlock(self.call_method("_mark", [marks]), [], [], body).set_lineno(line)

    def _mark(self, marks: str, caller: Any) -> str:
        return f"{marks[0]}{caller()}{marks[1]}"


_OTHER_TOKENS = r"\s*<\|[^<>|\s]+\|>\s*"  # Cohere writes <|END_RESPONSE|> before the token that ends a turn
_MARKS = "generation_marks"  # a template variable: the two characters that the tag writes around the assistant's words


def _unused(*values: Any) -> str:
    """Two private use characters that are in no text of these values: removed after rendering, their places are the
    spans.
    """
    text = json.dumps(values, ensure_ascii=False, default=str)
    # icon fonts and emoji of old phones use some of them
    return next(marks for at in range(0xF0000, 0xFFFFC, 2) if not set(marks := chr(at) + chr(at + 1)) & set(text))


class ChatTemplate:
    """A compiled template and the special tokens that it may print."""

    def __init__(self, source: str, tokens: dict[str, str], end_tokens: Iterable[str] = ()) -> None:
        """`tokens`: bos_token, eos_token, ... as templates name them. `end_tokens`: what may end a turn."""
        self.source, self._tokens = source, tokens
        self._ends = sorted({*end_tokens, tokens.get("eos_token", "")} - {""}, key=len, reverse=True)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = TODAY.strftime
        self._template = environment.from_string(source)
        self.marks_turns = "endgeneration" in source

    def render(
        self, messages: list[Message], tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. Invalid when the template refuses it, with the template's own words."""
        return self._render(messages, tools, add_generation_prompt, marks=("", ""))

    def with_printed_calls(self, conversation: Conversation) -> Conversation:
        """The conversation with its tool calls as the template wants them: arguments as an object or, in DeepSeek's, as JSON
        text beside no content. Invalid when they leave no trace: the model would learn to answer nothing.
        """
        called = [index for index, message in enumerate(conversation.messages) if message.get("tool_calls")]
        if not called:
            return conversation
        refused: list[Invalid] = []
        without = [{key: value for key, value in one.items() if key != "tool_calls"} for one in conversation.messages]
        try:
            plain = self.render(without, conversation.tools)
        except Invalid:
            plain = ""  # an answer of a tool may stand behind a call only
        names = _called(conversation.messages[called[0]])
        for messages in _forms(conversation.messages):
            try:
                text = self.render(messages, conversation.tools)
            except Invalid as invalid:
                refused.append(invalid)
                continue
            if all(text.count(name) > plain.count(name) for name in names):
                return replace(conversation, messages=messages)
        if len(refused) == len(list(_forms([]))):
            raise refused[0]
        raise Invalid(
            f"messages[{called[0]}].tool_calls: the model's chat template does not print tool calls; use a model whose "
            "template does, or write the call into the content"
        )

    def spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered text and the stretches to be learned: assistant turns with the token that ends them."""
        if self.marks_turns:
            return self._marked(conversation)
        text = self.render(conversation.messages, conversation.tools)
        found: list[Span] = []
        position = 0
        for index, message in enumerate(conversation.messages):
            if not conversation.learns(index):
                continue
            start, end = self._locate(text, position, conversation, index)
            start = self._with_opening(text, start, conversation, index)
            position = end = self._with_end_token(text, end)
            found.append((start, end))
        return text, found

    def _marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        marks = _unused(conversation.messages, conversation.tools, self.source)
        rendered = self._render(conversation.messages, conversation.tools, add_generation_prompt=False, marks=marks)
        pieces: list[str] = []
        spans: list[Span] = []
        position = start = 0
        for piece, mark in _split(rendered, marks):
            pieces.append(piece)
            position += len(piece)
            if mark == marks[0]:
                start = position
            elif mark == marks[1]:
                spans.append((start, position))
        text = "".join(pieces)
        turns = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        for index in turns:  # one for models that look at pictures prints nothing of a content without parts
            words = (conversation.messages[index]["content"] or "").rpartition("</think>")[2]
            if not all(word in text for word in words.split()[:1]):
                raise Invalid(f"messages[{index}]: the chat template does not print the assistant's words")
        if len(spans) == len(turns):
            return text, [span for span, index in zip(spans, turns, strict=True) if conversation.learns(index)]
        if conversation.skipped:
            raise Invalid(
                f"messages[{min(conversation.skipped)}].weight: the chat template marks {len(spans)} stretches for "
                f"{len(turns)} turns of the assistant, so which one is not learned is unknown; make the conversation shorter"
            )
        if conversation.learn_from:
            before = self.render(conversation.messages[: conversation.learn_from], conversation.tools)
            spans = [span for span in spans if span[0] >= _common_prefix(before, text)]
        return text, spans

    def _locate(self, text: str, position: int, conversation: Conversation, index: int) -> Span:
        """Where the content of turn `index` is. A content that occurs once is there; else the turns before say where to
        look.
        """
        message = conversation.messages[index]
        whole = message["content"] or ""
        content = whole.strip()
        written_by_template = message.get("tool_calls") or message.get("reasoning_content") or message.get("thinking")
        if not written_by_template and text.count(content) == 1 and not whole[0].isspace():
            start = text.index(content)
            return start, start + len(content)
        before = self.render(conversation.messages[:index], conversation.tools, add_generation_prompt=True)
        position = max(position, _common_prefix(before, text))
        if written_by_template:
            return self._written(text, position, conversation, index)
        if text.startswith(whole, position):  # an answer that begins with an indent is learned with it
            return position, position + len(whole.rstrip())
        start = text.find(content, position)
        if start < 0 and "</think>" in content:  # reasoning templates print only the newest thoughts
            content = content.rpartition("</think>")[2].strip()
            start = text.find(content, position)
        if start < 0:
            raise Invalid(
                f"messages[{index}]: the chat template does not print the assistant's words as they are; set "
                "training.lossOn: All"
            )
        return start, start + len(content)

    def _written(self, text: str, start: int, conversation: Conversation, index: int) -> Span:
        """Where turn `index` is, whose calls or thoughts the template writes in words of its own, from `start` on.

        It ends where the text parts from the conversation up to here; or, in templates that print a turn otherwise when it is
        the last one (Qwen3), where the rest is that of the same conversation in which something else was said here.
        """
        message = conversation.messages[index]
        asked = [*_called(message), (message["content"] or "").strip().rpartition("</think>")[2].strip()]
        until = self.render(conversation.messages[: index + 1], conversation.tools)
        end = _common_prefix(until, text)
        if not all(words in text[start:end] for words in asked):
            other = [*conversation.messages]
            other[index] = {"role": "assistant", "content": "\u2460"}
            end = len(text) - _common_prefix(self.render(other, conversation.tools)[::-1], text[::-1])
        if missing := next((words for words in asked if words not in text[start:end]), None):
            raise Invalid(
                f"messages[{index}]: {missing[:40]!r} cannot be found in what the chat template prints for this turn; set "
                "training.lossOn: All"
            )
        return start, start + len(text[start:end].rstrip())

    def _with_opening(self, text: str, start: int, conversation: Conversation, index: int) -> int:
        """`start`, moved before the words that the template puts between the generation prompt and the answer: a server asks
        with that prompt, so the model has to write them (Qwen3's empty thought, gpt-oss's channel).
        """
        if text[:start].rstrip().endswith(self._generation_prompt):
            return start
        asked = self.render(conversation.messages[:index], conversation.tools, add_generation_prompt=True)
        opens = text.startswith(asked) and text[len(asked) : start].strip()
        return len(asked) if opens else start

    @cached_property
    def _generation_prompt(self) -> str:
        """What opens an answer, as far as it does not depend on the conversation."""
        question: list[Message] = [{"role": "user", "content": "\u2460"}]
        try:
            text, asked = self.render(question), self.render(question, add_generation_prompt=True)
        except Invalid:
            return ""
        return asked[_common_prefix(text, asked) :].strip()

    def _with_end_token(self, text: str, end: int) -> int:
        """`end`, moved behind the token that ends the turn: a model that never sees it learned never stops."""
        for between in (r"\s*", _OTHER_TOKENS):
            for token in self._ends:
                if found := re.compile(between + re.escape(token)).match(text, end, end + 200):
                    return found.end()
        return end

    def ends_turn(self, text: str) -> bool:
        """Whether the text ends with a token that ends a turn."""
        return text.rstrip().endswith(tuple(self._ends)) if self._ends else True

    def _render(
        self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool, marks: Sequence[str]
    ) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{_MARKS: marks},
                **self._tokens,
            )
        except jinja2.TemplateError as error:
            raise Invalid(f"the model's chat template refuses the conversation: {error.message or error}") from error
        except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            raise Invalid(
                f"the model's chat template fails on the conversation: {type(error).__name__}: {error}"
            ) from error


def default_template(vocabulary: dict[str, int]) -> str:
    """A template for a model that has none: ChatML where its tokens exist, plain headings otherwise."""
    return CHATML if {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys() else PLAIN


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The ways in which templates want tool calls, the usual one first."""
    for as_text, without_content in ((False, False), (True, False), (False, True), (True, True)):
        yield [
            {
                **one,
                "content": one["content"] or (None if without_content else ""),
                "tool_calls": [_call(call, as_text) for call in one["tool_calls"]],
            }
            if one.get("tool_calls")
            else one
            for one in messages
        ]


def _called(message: Message) -> list[str]:
    """The names of the tools that a turn calls."""
    return [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls") or ()]


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    if not as_text:
        return call
    inner = call.get("function", call)
    written = {**inner, "arguments": json.dumps(inner.get("arguments"), ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else written


def _split(text: str, marks: str) -> Iterator[tuple[str, str]]:
    """Pieces of text, each with the mark that follows it."""
    rest = text
    while rest:
        places = [place for place in map(rest.find, marks) if place >= 0]
        if not places:
            yield rest, ""
            return
        place = min(places)
        yield rest[:place], rest[place]
        rest = rest[place + 1 :]


def _common_prefix(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # by halving: comparing slices is done in C
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
