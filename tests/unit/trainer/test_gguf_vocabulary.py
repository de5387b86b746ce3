"""Tokenizers as llama.cpp reads them: the same tokens of the same texts, or a refusal before a GPU is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.failures import RunFailure
from finetune_trainer.results.gguffile import verify, vocabulary
from finetune_trainer.results.gguffile.make import refuse_early

LLAMA = {"model_type": "llama"}
# The very texts that are compared, so that there are long tokens in them and each way to split makes others.
CORPUS = [*verify.TEXTS, verify.MARKS] * 8


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>", **config}))
    return folder


def byte_level(folder: Path, splits: list[Any], ignore_merges: bool = False, size: int = 600) -> Path:
    """As Llama 3, Qwen and GPT-2 have it: bytes, and a pattern by which a text is split."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return save(tokenizer, folder)


def sentencepiece(folder: Path, prefix: bool) -> Path:
    """As Llama 2, Mistral and Gemma have it: characters, bytes for those it has not, blanks as a character."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replaced = normalizers.Replace(" ", vocabulary.SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(vocabulary.SPACE), replaced]) if prefix else replaced
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=800, special_tokens=special))
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.add_special_tokens(["<|turn|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return save(tokenizer, folder, unk_token="<unk>")


def isolated(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize("patterns", vocabulary.SPLITS, ids=vocabulary.SPLITS.values())
def test_llama_cpp_splits_a_text_as_the_tokenizer_does(tmp_path: Path, patterns: tuple[str, ...]) -> None:
    whole = vocabulary.SPLITS[patterns] in ("llama-bpe", "tekken")
    folder = byte_level(tmp_path, [*map(isolated, patterns), BYTES], ignore_merges=whole)
    refuse_early(folder, LLAMA, load_tokenizer(folder), tmp_path)


def pre(folder: Path) -> str:
    return vocabulary.vocabulary_of(load_tokenizer(folder), 700).pre


def test_a_way_to_split_is_known_however_it_is_written_down(tmp_path: Path) -> None:
    assert pre(byte_level(tmp_path, [GPT2])) == "gpt-2"
    assert pre(byte_level(tmp_path, [pre_tokenizers.Digits(individual_digits=True), GPT2])) == "smollm"
    assert pre(byte_level(tmp_path, [pre_tokenizers.Split(Regex(vocabulary.LLAMA3), "removed", True), BYTES])) == "dbrx"
    assert pre(byte_level(tmp_path, [isolated(vocabulary.LLAMA3), BYTES], ignore_merges=True)) == "llama-bpe"


@pytest.mark.parametrize("prefix", [True, False], ids=["as-llama-2", "as-gemma"])
def test_llama_cpp_reads_a_sentencepiece_tokenizer_of_tokenizer_json(tmp_path: Path, prefix: bool) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path, prefix))
    assert len(tokenizer.backend.encode("Köln and Hello 東").ids) < 20
    refuse_early(tmp_path, LLAMA, tokenizer, tmp_path)
    found = vocabulary.vocabulary_of(tokenizer, 900)
    assert (found.model, found.space_prefix) == ("llama", prefix)
    assert found.tokens[-1] == "[PAD899]"
    assert vocabulary.special_tokens(tmp_path, tokenizer, 900).add_special_token == {"bos": True, "eos": False}


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ([isolated(r"\w+"), BYTES], r"no name for this way to split a text: \w+"),
        ([pre_tokenizers.Whitespace(), BYTES], "no pre-tokenizer Whitespace before BPE"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], "no ByteLevel pre-tokenizer with add_prefix_space"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused_with_what_to_do(
    tmp_path: Path, splits: list[Any], said: str
) -> None:
    folder = byte_level(tmp_path, splits)
    with pytest.raises(RunFailure) as refused:
        refuse_early(folder, LLAMA, load_tokenizer(folder), tmp_path)
    assert said in refused.value.message
    assert "remove GGUF from output.exports" in refused.value.message


def test_llama_cpp_strips_behind_special_tokens_where_the_tokenizer_does(tmp_path: Path) -> None:
    """As Phi-3's."""
    tokenizer = Tokenizer.from_file(str(sentencepiece(tmp_path, prefix=False) / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|endoftext|>", AddedToken("<|end|>", rstrip=True, normalized=False)])
    save(tokenizer, tmp_path, chat_template="{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}")
    loaded = load_tokenizer(tmp_path)
    ids = loaded.backend.encode("a<|end|>\n  b").ids
    assert ids == loaded.backend.encode("a<|end|>b").ids
    refuse_early(tmp_path, LLAMA, loaded, tmp_path)


def test_tokens_beyond_the_embedding_are_left_out(tmp_path: Path) -> None:
    found = vocabulary.vocabulary_of(load_tokenizer(byte_level(tmp_path, [GPT2], size=600)), 500)
    assert len(found.tokens) == len(found.types) == 500


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = byte_level(tmp_path, [GPT2])
    monkeypatch.setitem(vocabulary.SPLITS, (vocabulary.GPT2,), "smollm")
    with pytest.raises(RunFailure, match="would answer other questions than were asked"):
        refuse_early(folder, LLAMA, load_tokenizer(folder), tmp_path)
