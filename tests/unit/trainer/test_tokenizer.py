"""Token ids and labels: what is learned is counted token by token, with byte-level and with SentencePiece-like tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from finetune_trainer.data.formats import Conversation, Pair, Sample, Text
from finetune_trainer.data.tokenizer import IGNORE, ModelTokenizer, Tokens, load_tokenizer
from finetune_trainer.failures import RunFailure

from . import templates

CORPUS = ["one two three four five six seven", "user assistant system", "2+2? yes no [INST] [/INST] ###"] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer


def byte_level_with_bos() -> Tokenizer:
    tokenizer = byte_level()
    bos = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2: a blank is put in front of the text, blanks become a visible character."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while training: no token of two words
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *fallback]))
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


KINDS = {"byte level": byte_level, "byte level with bos": byte_level_with_bos, "sentencepiece": sentencepiece_like}


def load(
    tmp_path: Path, tokenizer: Tokenizer, template: str | None = templates.CHATML, **config: Any
) -> ModelTokenizer:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"chat_template": template} if template else {}))
    )
    return load_tokenizer(tmp_path)


def encode(tokenizer: ModelTokenizer, sample: Sample, loss_on: str = "Completion") -> Tokens:
    (tokens,) = tokenizer.encode(tokenizer.render(sample, loss_on))
    return tokens


def learned(tokenizer: ModelTokenizer, tokens: Tokens) -> list[str]:
    """The text of each stretch of learned tokens."""
    return [tokenizer.decode(run) for run in _runs(tokens)]


def _runs(tokens: Tokens) -> list[list[int]]:
    runs: list[list[int]] = []
    inside = False
    for token, label in zip(tokens.input_ids.tolist(), tokens.labels.tolist(), strict=True):
        if label != IGNORE:
            assert label == token
            if not inside:
                runs.append([])
            runs[-1].append(token)
        inside = label != IGNORE
    return runs


TALK = Conversation(
    [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "3+3? ünïcödé"},
        {"role": "assistant", "content": "six, naturally"},
    ]
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (templates.CHATML, "<|im_end|>"),
        (templates.LLAMA2, " </s>"),
        (templates.GENERATION, "<|im_end|>"),
        (None, "<|im_end|>"),
    ],
    ids=["chatml", "llama2", "generation", "default"],
)
def test_exactly_the_assistants_tokens_are_learned(tmp_path: Path, kind: str, template: str | None, ends: str) -> None:
    tokenizer = load(tmp_path, KINDS[kind](), template)
    tokens = encode(tokenizer, TALK)
    assert [text.strip() for text in learned(tokenizer, tokens)] == [f"four{ends}", f"six, naturally{ends}"]
    whole = tokenizer.backend.encode(tokenizer.template.render(TALK.messages), add_special_tokens=False)
    assert tokens.input_ids.tolist() == whole.ids
    # counted by hand: every token whose characters lie in an answer, and no other
    _, spans = tokenizer.template.spans(TALK)
    inside = [any(start < end_ and end > start_ for start, end in spans) for start_, end_ in whole.offsets]
    assert (tokens.labels != IGNORE).tolist() == inside


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_but_the_first_are_learned_when_asked(tmp_path: Path, kind: str) -> None:
    tokens = encode(load(tmp_path, KINDS[kind]()), TALK, "All")
    assert tokens.labels[0] == IGNORE
    assert (tokens.labels[1:] == tokens.input_ids[1:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_begins_and_ends_as_the_tokenizer_says(tmp_path: Path, kind: str) -> None:
    tokenizer = load(tmp_path, KINDS[kind]())
    tokens = encode(tokenizer, Text("one two"))
    expected = [*tokenizer.backend.encode("one two").ids, 2]
    assert tokens.input_ids.tolist() == expected
    assert tokens.labels.tolist() == [IGNORE, *expected[1:]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_completion_is_learned_with_its_end(tmp_path: Path, kind: str) -> None:
    tokenizer = load(tmp_path, KINDS[kind]())
    tokens = encode(tokenizer, Pair("one two", " three four"))
    assert [text.strip() for text in learned(tokenizer, tokens)] == ["three four</s>"]


@pytest.mark.parametrize("kind", KINDS)
def test_begin_and_end_that_a_text_has_written_out_are_not_doubled(tmp_path: Path, kind: str) -> None:
    """As guanaco-llama2 and the like are written: <s>[INST] ... [/INST] ... </s>."""
    tokenizer = load(tmp_path, KINDS[kind]())
    ids = encode(tokenizer, Text("<s>[INST] one [/INST] two</s>")).input_ids.tolist()
    assert (ids.count(1), ids.count(2)) == (1, 1)
    assert (ids[0], ids[-1]) == (1, 2)
    answer = encode(tokenizer, Pair("one two", " three</s>"))
    assert [text.strip() for text in learned(tokenizer, answer)] == ["three</s>"]


def test_an_answer_that_the_template_never_ends_is_ended(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, byte_level(), templates.ENDLESS)
    assert learned(tokenizer, encode(tokenizer, TALK))[-1].strip() == "six, naturally</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_is_that_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = load(tmp_path, KINDS[kind]())
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    ids = theirs.apply_chat_template(TALK.messages, return_dict=False)
    assert encode(tokenizer, TALK).input_ids.tolist() == list(ids)
    assert encode(tokenizer, Text("one two ünï")).input_ids.tolist() == [*theirs("one two ünï")["input_ids"], 2]


def test_the_digest_changes_with_the_template(tmp_path: Path) -> None:
    first = load(tmp_path, byte_level()).digest
    assert load(tmp_path, byte_level()).digest == first
    assert load(tmp_path, byte_level(), templates.QWEN3).digest != first


def test_the_newest_place_of_a_template_wins(tmp_path: Path) -> None:
    assert load(tmp_path, byte_level(), None).has_own_template is False
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert load(tmp_path, byte_level(), None, chat_template=named).template.source == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert load(tmp_path, byte_level()).template.source == "z"


def test_the_end_of_a_text_is_what_generation_stops_at_when_the_tokenizer_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    tokenizer = load(tmp_path, byte_level(), None, eos_token=None)
    assert (tokenizer.eos_token, tokenizer.eos) == ("</s>", (2,))
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path, byte_level(), None, eos_token=None).eos == ()


def test_a_turn_ends_where_generation_stops(tmp_path: Path) -> None:
    """GLM's templates have no token for the end of a turn: its generation stops where the next turn would begin."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    source = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% endif %}{{ m.content }}{% endfor %}"
    tokenizer = load(tmp_path, byte_level(), source)
    answers = learned(tokenizer, encode(tokenizer, TALK))
    assert [text.strip() for text in answers] == ["four<|im_start|>", "six, naturally</s>"]


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RunFailure, match="tokenizer.json cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.reason == "BaseModelNotFound"
