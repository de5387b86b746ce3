"""The run's model as lm-eval asks it: the numbers of lm-eval's own adapter, whatever the batches and the layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from finetune_trainer.evaluation.tasks import model as loaded
from finetune_trainer.evaluation.tasks.model import LoadedModel
from finetune_trainer.methods.initialization import as_base
from finetune_trainer.objectives.objective import make_autocast
from finetune_trainer.training.distributed import World
from finetune_trainer.training.precision import choose_precision

from .small_run import CPU, Setup
from .tiny import finetune_spec

pytestmark = pytest.mark.timeout(120)

QUESTIONS = ["alpha beta gamma", "delta", "epsilon zeta eta theta iota ", "one two three four five " * 4]
CHOICES = [" alpha", " beta", " five four", " kappa lambda mu one two"]


class Pair:
    """Our adapter and lm-eval's own around one trained model."""

    def __init__(self, folder: Path, model: Path, method: dict[str, Any]) -> None:
        self.run = Setup(folder, model, finetune_spec(method=method))
        self.run.run(6)
        tokenizer = AutoTokenizer.from_pretrained(model)
        layout = "flat" if self.run.model.config._attn_implementation == "finetune_packed" else "padded"
        autocast = make_autocast(CPU, choose_precision("FP32", "cpu", False))
        self.ours = LoadedModel(self.run.model, tokenizer, layout, autocast, 0, World(), CPU)
        self.run.model.device_type = "cpu"
        self.theirs = HFLM(pretrained=self.run.model, tokenizer=tokenizer, batch_size=3)

    def ask(self, lm: Any, kind: str, arguments: list[tuple[Any, ...]]) -> Any:
        network = self.run.model.get_base_model()
        before = network.config._attn_implementation
        if lm is self.theirs:
            network.set_attn_implementation("sdpa")
        try:
            return getattr(lm, kind)([Instance(kind, {}, one, 0) for one in arguments])
        finally:
            network.set_attn_implementation(before)


@pytest.fixture(scope="module", params=["LoRA", "PromptTuning"])
def pair(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    method = {"type": request.param, **({"lora": {"rank": 4, "alpha": 8}} if request.param == "LoRA" else {})}
    return Pair(tmp_path_factory.mktemp("pair"), tiny_llama, method)


def test_continuations_are_as_likely_as_lm_eval_says(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [(question, choice) for question in QUESTIONS for choice in CHOICES]
    asked += [("", " alpha beta"), ("alpha " * 600, " beta gamma")]
    theirs = pair.ask(pair.theirs, "loglikelihood", asked)
    for tokens in (1, 40, 4096):
        monkeypatch.setattr(pair.ours, "tokens", tokens)
        ours = pair.ask(pair.ours, "loglikelihood", asked)
        assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], abs=1e-3)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    with as_base(pair.run.model, pair.run.initial):
        base = pair.ask(pair.ours, "loglikelihood", asked)
    assert [logprob for logprob, _ in base] != pytest.approx([logprob for logprob, _ in theirs], abs=1e-2)


def test_whole_texts_are_as_likely_as_lm_eval_says(pair: Pair) -> None:
    asked = [("alpha beta gamma",), ("one two three four five " * 150,)]
    ours, theirs = (pair.ask(lm, "loglikelihood_rolling", asked) for lm in (pair.ours, pair.theirs))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_answers_are_written_as_lm_eval_has_them_written(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        (question, {"until": until, "max_gen_toks": 12, "do_sample": False})
        for until in (["\n"], ["a"])
        for question in QUESTIONS
    ]
    theirs = [pair.ask(pair.theirs, "generate_until", [one])[0] for one in asked]
    for tokens in (1, 4096):
        monkeypatch.setattr(pair.ours, "tokens", tokens)
        assert pair.ask(pair.ours, "generate_until", asked) == theirs
    assert any(theirs)


def test_choices_of_one_token_are_read_from_one_row(pair: Pair) -> None:
    requests = [(None, [5, 6, 7], [token]) for token in (8, 9, 10, 11)] + [(None, [5, 6, 7], [8, 9])]
    texts = pair.ours._texts(requests)
    assert [len(text.requests) for text in texts] == [1, 4]


def test_a_batch_is_bounded_by_its_tokens(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = pair.ours._texts([(None, list(range(3, 3 + length)), [50 + length]) for length in range(1, 30)])
    monkeypatch.setattr(pair.ours, "tokens", 32)
    batches = list(pair.ours._batches(texts))
    assert [text for batch in batches for text in batch] == texts
    lengths = [[len(text.row.input_ids) for text in batch] for batch in batches]
    size = (lambda batch: len(batch) * max(batch)) if pair.ours.padded else sum
    assert all(size(batch) <= 32 or len(batch) == 1 for batch in lengths)


def test_progress_is_told_now_and_then(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "SAY_EVERY", 0.0)
    with caplog.at_level("INFO"):
        loaded.Pace("questions", 10).done(4)
    assert "tasks: 4 of 10 questions" in caplog.text


def test_sampling_draws_the_same_each_time(pair: Pair) -> None:
    asked = [(QUESTIONS[0], {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0})]
    first, second = (pair.ask(pair.ours, "generate_until", asked) for _ in range(2))
    assert first == second
    assert torch.is_grad_enabled()
