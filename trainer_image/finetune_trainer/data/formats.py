"""The shapes that rows come in: which columns make a format, and how a row of it becomes a sample.

Every format is one function `row -> Sample` that raises Invalid with a message which names the field and the fix. Roles
are normalised here (human is user, gpt is assistant); what follows only knows system, user, assistant and tool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from os.path import commonprefix
from typing import Any

Message = dict[str, Any]
"""{role: system|user|assistant|tool, content: str} and what chat templates know besides (tool_calls, name, ...)."""


class Invalid(ValueError):
    """This row cannot be used; the message says why and what to write instead."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, learned whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Plain prompt and completion: no template, the completion follows the prompt as it is written."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to be rendered by the chat template; assistant turns from `learn_from` on are learned, but for `skipped`."""

    messages: list[Message]
    learn_from: int = 0
    tools: list[Any] | None = None
    skipped: frozenset[int] = frozenset()

    def learns(self, index: int) -> bool:
        """Whether the turn at `index` is learned."""
        return self.messages[index]["role"] == "assistant" and index >= self.learn_from and index not in self.skipped


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, the first better."""

    chosen: Pair | Conversation
    rejected: Pair | Conversation


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer, good or bad."""

    answer: Pair | Conversation
    label: bool


Sample = Text | Pair | Conversation | Preference | Judged
Row = Mapping[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_KEPT = ("tool_calls", "name", "tool_call_id", "reasoning_content", "thinking")


def _text(row: Row) -> Text:
    return Text(_string(row, "text"))


def _messages(row: Row) -> Conversation:
    return _conversation(row, "messages")


def _sharegpt(row: Row) -> Conversation:
    return _conversation(row, "conversations")


def _prompt_completion(row: Row) -> Pair | Conversation:
    return _answer(row, "completion")


def _alpaca(row: Row) -> Conversation:
    instruction, context = _string(row, "instruction"), _string(row, "input", required=False)
    user = f"{instruction}\n\n{context}" if context.strip() else instruction
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": _string(row, "output")}]
    return Conversation([*_system(row), *_history(row), *messages])


def _history(row: Row) -> list[Message]:
    """The turns before an instruction, in LLaMA-Factory's files: a list of [question, answer]."""
    history = row.get("history")
    if not history:
        return []
    pairs = _list(row, "history")
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Invalid(f"history[{index}] is {_shown(pair)}: a list of two texts, question and answer, is needed")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _preference(row: Row) -> Preference:
    if isinstance(row.get("chosen"), dict) and "prompt" not in row and "conversations" in row:
        row = {**row, "prompt": row["conversations"]}  # LLaMA-Factory's files: turns, and one message for each answer
    whole = row.get("prompt") is None and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)
    if whole and row["chosen"] != row["rejected"]:
        row = {**row, **_implicit_prompt(row["chosen"], row["rejected"])}
    if row.get("chosen") and row.get("chosen") == row.get("rejected"):
        raise Invalid("chosen and rejected are the same: there is nothing to prefer")
    return Preference(_answer(row, "chosen"), _answer(row, "rejected"))


def _implicit_prompt(chosen: str, rejected: str) -> dict[str, str]:
    """The beginning that two whole texts share (hh-rlhf), as TRL's extract_prompt finds it."""
    end = len(commonprefix((chosen, rejected)))
    if chosen[end - 1 : end] == " ":
        end -= 1  # the space belongs to the answer's first token
    if not chosen[:end].strip():
        raise Invalid("has no 'prompt', and chosen and rejected begin with different texts: add a prompt")
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _unpaired_preference(row: Row) -> Judged:
    label = row.get("label")
    if isinstance(label, str) and label.strip().lower() in ("true", "1", "false", "0"):  # CSV has text only
        label = label.strip().lower() in ("true", "1")
    if label not in (True, False):
        raise Invalid(f"label is {_shown(label)}: write true for a good answer, false for a bad one")
    return Judged(_answer(row, "completion"), bool(label))


@dataclass(frozen=True)
class Format:
    """A format: the columns that it is recognised by, how one row is read, and other names that its columns are known
    by.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Sample]
    synonyms: Mapping[str, str] = field(default_factory=dict)


# Sorted from the most to the least telling: a row with chosen and rejected often has a prompt and messages too.
FORMATS = (
    Format("Preference", ("chosen", "rejected"), _preference),
    Format("UnpairedPreference", ("prompt", "completion", "label"), _unpaired_preference),
    Format("Messages", ("messages",), _messages),
    Format("ShareGPT", ("conversations",), _sharegpt),
    Format(
        "Alpaca", ("instruction", "output"), _alpaca, synonyms={"output": "response", "input": "context"}
    ),  # dolly's names
    Format("PromptCompletion", ("prompt", "completion"), _prompt_completion),
    Format("Text", ("text",), _text),
)
BY_NAME = {form.name: form for form in FORMATS}
SFT_FORMATS = ("Messages", "ShareGPT", "Alpaca", "PromptCompletion", "Text")
FORMATS_OF = {
    "SFT": SFT_FORMATS,
    "DPO": ("Preference",),
    "ORPO": ("Preference",),
    "Reward": ("Preference",),
    "KTO": ("UnpairedPreference",),
}


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under the format's own column names. `columns`: own name -> the dataset's name."""
    if not columns:
        return row
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken and name not in columns}
    return kept | {own: row[theirs] for own, theirs in columns.items() if theirs in row}


def with_synonyms(row: Row, form: Format) -> Row:
    """The row with the format's other names (dolly's response) put in place where the own name (output) is absent."""
    absent = {own: theirs for own, theirs in form.synonyms.items() if own not in row and theirs in row}
    return rename(row, absent)


def recognise(row: Row, objective: str) -> Format | None:
    """The format whose columns a row (renamed already) has, among those that the objective can learn from."""
    suited = [form for form in FORMATS if form.name in FORMATS_OF[objective]]
    return next((form for form in suited if all(name in with_synonyms(row, form) for name in form.columns)), None)


def describe(objective: str) -> str:
    """The formats of an objective and their columns, for messages."""
    return "; ".join(f"{name} {{{', '.join(BY_NAME[name].columns)}}}" for name in FORMATS_OF[objective])


def _string(row: Row, name: str, required: bool = True) -> str:
    value = row.get(name)
    if value is None and not required:
        return ""
    if name not in row:
        raise Invalid(f"has no {name!r}; its columns are {', '.join(map(str, row)) or 'none'}")
    if not isinstance(value, str):
        raise Invalid(f"{name} is {_shown(value)}: text is needed")
    if required and not value.strip():
        raise Invalid(f"{name} is empty")
    return value


def _list(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a CSV cell
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Invalid(f"{name} is text that is not JSON ({error})") from error
    if name not in row:
        raise Invalid(f"has no {name!r}; its columns are {', '.join(map(str, row)) or 'none'}")
    if not isinstance(value, list):
        raise Invalid(f"{name} is {_shown(value)}: a list of messages is needed")
    if not value:
        raise Invalid(f"{name} is empty")
    return value


def _system(row: Row) -> list[Message]:
    system = _string(row, "system", required=False)
    return [{"role": "system", "content": system}] if system.strip() else []


def _tools(row: Row) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise Invalid(f"tools is text that is not JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise Invalid(f"tools is {_shown(tools)}: a list of JSON schemas is needed")
    return tools


def _answer(row: Row, name: str) -> Pair | Conversation:
    """Prompt and answer, both as text or both as messages; `name` is the answer's column. Chosen and rejected may hold
    all.
    """
    value, prompt, system = row.get(name), row.get("prompt"), _system(row)
    if isinstance(value, dict):  # one message, as LLaMA-Factory and axolotl have it
        value = [value]
    if isinstance(value, list):
        answer = _turns(value, name)
        if isinstance(prompt, list):
            before = _turns(prompt, "prompt")
        elif isinstance(prompt, str) and prompt.strip() and answer[0]["role"] == "assistant":
            before = [{"role": "user", "content": prompt}]
        else:
            before = []  # the conversation is whole in `name`; its last turn is the answer
        messages = [*([] if before[:1] and before[0]["role"] == "system" else system), *before, *answer]
        _check_order(messages, name)
        return Conversation(messages, learn_from=len(messages) - len(answer) if before else len(messages) - 1)
    if isinstance(prompt, list):
        before = _turns(prompt, "prompt")
        messages = [*before, {"role": "assistant", "content": _string(row, name)}]
        _check_order(messages, "prompt")
        return Conversation(messages, learn_from=len(before))
    text, completion = _string(row, "prompt"), _string(row, name)
    if "system" in row:  # rows with a system column are conversations, also those whose system message is empty
        messages = [*system, {"role": "user", "content": text}, {"role": "assistant", "content": completion}]
        return Conversation(messages)
    return Pair(text, completion)


def _conversation(row: Row, name: str) -> Conversation:
    values = _list(row, name)
    messages = _turns(values, name)
    before = _system(row) if messages[0]["role"] != "system" else []
    skipped = frozenset(index for index, value in enumerate(values, len(before)) if _weight(value, name, index) == 0)
    messages = [*before, *messages]
    _check_order(messages, name)
    return Conversation(messages, tools=_tools(row), skipped=skipped)


def _weight(value: Mapping[str, Any], name: str, index: int) -> int:
    """OpenAI's `weight` of a turn: 0 is not learned."""
    weight = value.get("weight")
    if weight not in (None, 0, 1):
        raise Invalid(f"{name}[{index}].weight is {_shown(weight)}: use 0 (not learned) or 1")
    return 1 if weight is None else int(weight)


def _turns(values: list[Any], name: str) -> list[Message]:
    return [_turn(value, f"{name}[{index}]") for index, value in enumerate(values)]


def _turn(value: Any, at: str) -> Message:
    """One message from {role, content} or ShareGPT's {from, value}, its role normalised."""
    if not isinstance(value, dict):
        raise Invalid(f"{at} is {_shown(value)}: an object with role and content is needed")
    role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    named = value.get(role_key)
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        what = f"has no {role_key}" if role_key not in value else f".{role_key} is {_shown(named)}"
        raise Invalid(f"{at}{'' if what.startswith('.') else ' '}{what}: use system, user, assistant or tool")
    optional = role in ("system", "tool") or bool(value.get("tool_calls"))  # a tool may answer nothing
    content = _content(value.get(content_key), f"{at}.{content_key}", optional)
    kept = {key: value[key] for key in _KEPT if value.get(key) is not None}
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(kept["tool_calls"], f"{at}.tool_calls")
    return {"role": role, "content": content, **kept}


def _calls(value: Any, at: str) -> list[Any]:
    """Tool calls with arguments as objects: OpenAI's files have them as JSON in a text, which templates print as a text in
    quotes, while vLLM gives templates the object."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise Invalid(f"{at} is {_shown(value)}: a list of calls is needed, each with function.name and .arguments")
    calls = []
    for index, call in enumerate(value):
        function = call.get("function")
        inner = function if isinstance(function, dict) else call
        if isinstance(text := inner.get("arguments"), str):
            try:
                arguments = json.loads(text or "{}")
            except ValueError as error:
                raise Invalid(f"{at}[{index}].function.arguments is text that is not JSON ({error})") from error
            inner = {**inner, "arguments": arguments}
        calls.append({**call, "function": inner} if isinstance(function, dict) else inner)
    return calls


def _content(value: Any, at: str, optional: bool) -> str:
    if isinstance(value, list):  # OpenAI's content parts
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        if any(not isinstance(part, str) for part in parts):
            raise Invalid(f"{at} has parts that are not text: only text can be learned")
        value = "".join(parts)  # type: ignore[arg-type]
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise Invalid(f"{at} is {_shown(value)}: text is needed")
    if not value.strip() and not optional:
        raise Invalid(f"{at} is empty")
    return value


def _check_order(messages: list[Message], name: str) -> None:
    """System at most once and first, then user and assistant in turn, tools between; the last turn is what is "
    "learned."""
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise Invalid(
            f"{name} ends with a {roles[-1]} turn: the last turn must be the assistant's, it is what is learned"
        )
    turns = roles[1:] if roles[0] == "system" else roles
    if turns[0] != "user":
        raise Invalid(f"{name} begins with a turn of {turns[0]}: the first turn after system must be the user's")
    allowed = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant"), "system": ()}
    offset = len(roles) - len(turns)
    for index, (before, after) in enumerate(pairwise(turns), start=offset + 1):
        if after not in allowed[before]:
            raise Invalid(
                f"{name}[{index}] is a turn of {after} after {before}: user and assistant must take turns, system "
                "comes first"
            )


def _shown(value: Any) -> str:
    """A value as it is quoted in a message."""
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:39] + "…"
