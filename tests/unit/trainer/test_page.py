"""report.html: what it shows, what it leaves out, and that nobody's text becomes markup."""

import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from finetune_operator.api.finetunestatus import AdapterStatus, EvaluationStatus
from finetune_trainer.data.prepared import histogram
from finetune_trainer.evaluation.gates import judge
from finetune_trainer.page.page import render
from finetune_trainer.page.story import Story
from finetune_trainer.page.svg import MOST_POINTS, Line, line_chart, number, thinned, ticks
from finetune_trainer.runspec import PrepareResult, RunSpec, Storage

from .tiny import finetune_spec

NASTY = "<script>alert(1)</script>\" onload='x' &amp; \x00 ü"


def a_story(**parts: Any) -> Story:
    prepared = PrepareResult.model_validate(
        {
            "runId": "0123456789abcdef",
            "baseModel": {"digest": "sha256:" + "a" * 64, "revision": "abc123", "parameters": 8_030_261_248},
            "dataset": {"digest": "sha256:" + "b" * 64, "samples": 2400, "tokens": 401234, "format": "Messages"},
            "estimate": {"verdict": "Fits", "gpuMemory": {"low": "9Gi", "expected": "11Gi", "high": "13Gi"}},
        }
    )
    run = RunSpec(
        stage="train", namespace="demo", name="support-bot", job="support-bot-train-1", storage=Storage(uri="s3://f"),
        spec=finetune_spec(**parts), prepared=prepared,
    )  # fmt: skip
    story = Story(run, total_steps=100)
    story.metrics = [
        {"step": n, "loss": 2.0 / n + 0.5, "gradNorm": 1.0 / n, "learningRate": 2e-4 * (1 - n / 100), "tokens": 900 * n}
        for n in range(1, 101)
    ]
    return story


class Page(HTMLParser):
    """Checks that every tag is closed, and keeps tags and text."""

    VOID = ("meta", "line", "path", "polyline", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_finished_run_is_told_whole() -> None:
    gates = finetune_spec(evaluation={"gates": [{"metric": "loss", "max": 1.2}]}).evaluation.gates
    story = a_story(evaluation={"gates": [{"metric": "loss", "max": 1.2}]}, resources={"gpus": 2},
                    budget={"maxCost": 5, "pricePerGpuHour": 3})  # fmt: skip
    story.evaluation = judge(gates, {"loss": 2.5}, {"loss": 1.021})
    story.adapter = AdapterStatus(digest="sha256:" + "c" * 64, size_bytes=3 << 20, trainable_parameters=13_631_488)
    story.answers = [{"prompt": "Who are you?", "base": "a model", "adapter": "the support bot"}]
    story.about = {"histogram": histogram(np.array([3, 5, 99])), "lengths": {"p50": 5}, "learnedTokens": 77}
    story.preview = [{"text": "[user] hi", "learned": False}, {"text": "hello</s>", "learned": True}]
    story.figures = {"secondsToFirstStep": 9.5, "gpuBytes": 12 << 30, "processSeconds": 1800.0, "trainSeconds": 1700.0}
    page = Page(render(story))
    for told in (
        "support-bot", "All gates passed", "100/100", "2.5 → 1.021", "loss 1.021 <= 1.2", "c" * 12, "13,631,488",
        "Who are you?", "the support bot", "11Gi (9Gi to 13Gi)", "12.00 GiB", "9.5 s", "1.000", "3.00", "401,234",
        "base model on evaluation rows",
    ):  # fmt: skip
        assert told in page.text, told
    assert {"svg", "polyline", "rect", "mark"} <= page.tags


def test_tasks_are_told_with_their_errors() -> None:
    story = a_story()
    story.evaluation = judge([], {"loss": 2.5, "t/ppl": 9.0}, {"loss": 1.0, "t/ppl": 7.0}, ["t/ppl"])
    story.tasks = [
        {"metric": "t/ppl", "questions": 1200, "lower": True, "base": 9.0, "adapter": 7.0,
         "base_error": 0.25, "adapter_error": None},
    ]  # fmt: skip
    text = Page(render(story)).text
    assert "t/ppl (less is better)1,2009 ± 0.257" in text
    assert text.count("t/ppl") == 1


def test_a_run_that_failed_is_told_as_far_as_it_came() -> None:
    story = a_story()
    story.failure = "the loss became nan in step 101; lower training.learningRate"
    page = Page(render(story))
    assert "Failed: the loss became nan in step 101" in page.text
    assert "On held-out rows" not in page.text and "Answers" not in page.text


def test_a_run_with_nothing_but_its_inputs_is_a_page_too() -> None:
    story = a_story()
    story.metrics = []
    assert "svg" not in Page(render(story)).tags


def test_gates_that_were_not_passed_are_said_first() -> None:
    story = a_story()
    gates = finetune_spec(evaluation={"gates": [{"metric": "loss", "max": 0.1}]}).evaluation.gates
    story.evaluation = judge(gates, {"loss": 2.5}, {"loss": 1.0})
    page = Page(render(story))
    assert "Gates not passed" in page.text and "not passed: loss 1 > 0.1" in page.text


def test_early_stopping_says_which_step_the_adapter_is_of() -> None:
    story = a_story(training={"maxSteps": 200, "earlyStopping": {"patience": 2}})
    story.total_steps, story.adapter = 200, AdapterStatus(digest="sha256:" + "c" * 64)
    for step, loss in ((25, 1.5), (50, 0.9), (75, 1.1), (100, 1.2)):
        story.metrics[step - 1]["evalLoss"] = loss
    story.evaluation = judge([], {"loss": 2.5}, {"loss": 0.9})
    text = Page(render(story)).text
    assert "The adapter is that of step 50, which had the lowest evaluation loss, 0.9." in text
    assert "Early stopping ended the run after step 100." in text


def test_text_that_runs_from_right_to_left_is_laid_out_so() -> None:
    story = a_story()
    story.answers = [{"prompt": "من أنت؟", "base": "أنا", "adapter": "مرحبا"}]
    story.preview = [{"text": "مرحبا", "learned": True}]
    assert len(re.findall(r"<(?:pre|p class=\"prompt\") dir=\"auto\">", render(story))) == 4


def test_no_text_of_others_becomes_markup_and_nothing_is_loaded() -> None:
    story = a_story(baseModel={"s3": {"uri": "s3://models/tiny"}})
    story.failure = NASTY
    story.answers = [{"prompt": NASTY, "base": NASTY, "adapter": NASTY}]
    story.preview = [{"text": NASTY, "learned": True}]
    story.about = {"lengths": {"max": 3}, "packing": NASTY}
    story.evaluation = EvaluationStatus(base={NASTY: 1.0}, adapter={NASTY: 2.0})
    text = render(story)
    assert "script" not in Page(text).tags
    assert not re.search(r"(src|href)=|url\(|@import|https?://", text)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0], [0.0, 0.0], [1e-9, 2e-9], [1e9, -3.0], [5.0, math.inf, 4.0]])
def test_any_curve_can_be_drawn(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values, 1)]
    drawn = line_chart("t", [Line("l", points, "train")], "x", "y", ("base", math.nan))
    assert "nan" not in drawn and "inf" not in drawn
    assert bool(drawn) == any(math.isfinite(value) for value in values)


def test_a_long_curve_is_drawn_with_few_points_and_keeps_its_mean() -> None:
    few = thinned([(float(step), float(step % 7)) for step in range(100_000)])
    assert len(few) <= MOST_POINTS
    assert sum(y for _, y in few) / len(few) == pytest.approx(3.0, abs=0.01)


def test_a_long_curves_axis_ends_at_its_last_step() -> None:
    chart = line_chart("Loss", [Line("", [(float(step), 1.0) for step in range(1, 5001)], "train")], "step", "", None)
    assert ">5,000</text>" in chart


def test_an_empty_answer_is_not_taken_for_words_of_the_model() -> None:
    story = a_story()
    story.answers = [{"prompt": "Hello?", "base": "", "adapter": "Hello!"}]
    text = render(story)
    assert "<em>an empty answer</em>" in text and '<pre dir="auto">Hello!</pre>' in text


def test_ticks_are_round_numbers() -> None:
    assert ticks(0, 4, 8, least=1) == [0, 1, 2, 3, 4], "there is no half a step"
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert [number(value) for value in ticks(0.31, 0.97)] == ["0.4", "0.6", "0.8"]
    assert number(12000) == "12,000" and number(2e-5) == "2e-5"


def test_lengths_are_counted_in_at_most_25_bars() -> None:
    lengths = np.array([1, 1, 2, 50, 4096])
    bars = histogram(lengths)
    assert sum(bars["counts"]) == 5 and len(bars["counts"]) <= 25
    assert len(bars["edges"]) == len(bars["counts"]) + 1 and bars["edges"][-1] > 4096
    assert histogram(np.zeros(0, np.int64)) == {}
