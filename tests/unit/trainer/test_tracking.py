"""Following a run in a tracker: what it gets and when, and that a bad one costs the run nothing."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api.finetunestatus import AdapterStatus, EvaluationStatus
from finetune_operator.api.tracking import Tracking as Asked
from finetune_trainer.page.story import Story
from finetune_trainer.results.tracking import about, follow
from finetune_trainer.results.tracking.follow import End, Follower, Lines, TrackerRefused, Tracking
from finetune_trainer.runspec import PrepareResult, RunSpec, Storage

from .tiny import finetune_spec

SOON = 60.0


def a_story(steps: int = 0, **spec: Any) -> Story:
    prepared = PrepareResult.model_validate(
        {
            "runId": "0123456789abcdef",
            "baseModel": {"digest": "sha256:" + "a" * 64, "revision": "abc123", "parameters": 1000},
            "dataset": {"digest": "sha256:" + "b" * 64, "samples": 24, "tokens": 4000, "format": "Messages"},
        }
    )
    run = RunSpec(
        stage="train", namespace="demo", name="bot", job="bot-train-1", storage=Storage(uri="s3://finetune"),
        spec=finetune_spec(**spec), prepared=prepared,
    )  # fmt: skip
    story = Story(run)
    add_steps(story, steps)
    return story


def add_steps(story: Story, count: int) -> None:
    for step in range(len(story.metrics) + 1, len(story.metrics) + count + 1):
        story.metrics.append({"step": step, "loss": 2.0 / step, "learningRate": 1e-4, "time": 1.7e9 + step})


def finished(story: Story) -> Story:
    story.adapter = AdapterStatus(uri="s3://finetune/adapters/cc", digest="sha256:" + "c" * 64)
    story.evaluation = EvaluationStatus(adapter={"loss": 1.5}, base={"loss": 3.0}, passed=True)
    return story


class Notebook:
    """A tracker in memory. `errors`: what its next calls raise."""

    name: Any = "MLflow"
    url = "http://tracker/run"

    def __init__(self, *errors: Exception, has: int = 0) -> None:
        self.errors, self.steps, self.ends = list(errors), list(range(1, has + 1)), list[End]()
        self.answering = threading.Event()
        self.answering.set()

    def _answer(self) -> None:
        self.answering.wait(30)
        if self.errors:
            raise self.errors.pop(0)

    def open(self, story: Story) -> int:
        self._answer()
        return len(self.steps)

    def log(self, lines: Lines) -> None:
        self._answer()
        self.steps += [line["step"] for line in lines]

    def close(self, story: Story, end: End) -> None:
        self._answer()
        self.ends.append(end)


def until(condition: Any) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        threading.Event().wait(0.005)


def following(tracker: Notebook, story: Story) -> Follower:
    follower = Follower(tracker, story, interval=0.01)
    follower.start()
    return follower


def test_steps_arrive_while_training_goes_on_and_the_newest_when_it_is_complete() -> None:
    story, tracker = a_story(steps=3), Notebook()
    follower = following(tracker, story)
    until(lambda: tracker.steps == [1, 2])
    add_steps(story, 1)
    until(lambda: tracker.steps == [1, 2, 3])
    follower.end("Finished")
    assert follower.status().message == ""
    assert tracker.steps == [1, 2, 3, 4] and tracker.ends == ["Finished"]


def test_an_attempt_that_goes_on_from_a_checkpoint_sends_no_step_twice() -> None:
    story, tracker = a_story(steps=10), Notebook(has=14)
    follower = following(tracker, story)
    until(lambda: follower.sent == 14)
    add_steps(story, 6)
    follower.end("Finished")
    assert follower.status().message == ""
    assert tracker.steps == list(range(1, 17))


def test_a_tracker_that_was_away_gets_what_it_missed() -> None:
    story, tracker = a_story(steps=250), Notebook(OSError("no route"), OSError("no route"))
    follower = following(tracker, story)
    until(lambda: len(tracker.steps) == 249)
    follower.end("Finished")
    assert follower.status().message == ""
    assert tracker.steps == list(range(1, 251))


def test_a_tracker_that_breaks_off_is_asked_anew_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "BATCH", 10)
    story, tracker = a_story(steps=31), Notebook()

    log = tracker.log

    def cut_off(lines: Lines) -> None:
        log(lines)
        tracker.log = log  # type: ignore[method-assign]
        raise TimeoutError("the answer did not come")

    tracker.log = cut_off  # type: ignore[method-assign]
    follower = following(tracker, story)
    until(lambda: len(tracker.steps) == 30)
    follower.end("Finished")
    assert follower.status().message == ""
    assert tracker.steps == list(range(1, 32))


def test_one_that_never_answers_holds_the_end_of_a_run_up_no_longer_than_its_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(follow.PATIENCE, "Interrupted", 0.2)
    story, tracker = a_story(steps=3), Notebook()
    tracker.answering.clear()
    follower = following(tracker, story)
    before = time.monotonic()
    follower.end("Interrupted")
    told = follower.status()
    assert time.monotonic() - before < SOON
    assert told.message == "3 of 3 steps are missing there: it did not answer in time"
    tracker.answering.set()


def test_one_that_is_away_until_the_end_is_told_of() -> None:
    story, tracker = a_story(steps=3), Notebook(*[OSError("no route to host")] * 1000)
    follower = following(tracker, story)
    until(lambda: follower.trouble)
    follower.end("Finished")
    assert follower.status().message == "3 of 3 steps are missing there: OSError: no route to host"


def test_page_and_trouble_are_known_while_training_goes_on() -> None:
    story, tracker = a_story(steps=3), Notebook()
    follower = following(tracker, story)
    until(lambda: follower.sent == 2)
    assert (follower.now().url, follower.now().message) == ("http://tracker/run", "")
    tracker.errors += [OSError("no route to host")] * 1000
    add_steps(story, 1)
    until(lambda: follower.now().message == "OSError: no route to host")
    follower.end("Finished")


def test_one_that_refuses_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    story, tracker = a_story(steps=3), Notebook(TrackerRefused("the key is wrong"))
    follower = following(tracker, story)
    until(lambda: follower.trouble)
    follower.end("Finished")
    assert follower.status().message.endswith("the key is wrong")
    assert "the key is wrong; training goes on without it" in caplog.text
    assert tracker.steps == []


ASKED = Asked.model_validate({"mlflow": {"uri": "http://127.0.0.1:9"}})


def test_nothing_is_asked_before_the_first_step_and_nothing_where_none_is_configured(tmp_path: Path) -> None:
    story = a_story()
    asked = Tracking(story.run.model_copy(update={"tracking": ASKED}), story, tmp_path)
    assert [follower.tracker.name for follower in asked.followers] == ["MLflow"]
    assert asked.end("Interrupted") == [] and asked.end("Failed") == []
    assert not asked.followers[0].started
    assert Tracking(story.run, story, tmp_path).followers == []


def test_no_library_of_a_tracker_is_imported_at_the_start() -> None:
    code = (
        "import sys, finetune_trainer.train, finetune_trainer.results.tracking.mlflow, finetune_trainer.results.tracking.wandb\n"
        "print(sorted({'wandb', 'tensorboardX', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_of_which_only_the_evaluation_was_left_is_closed_too(tmp_path: Path) -> None:
    story = a_story(steps=3)
    asked = Tracking(story.run.model_copy(update={"tracking": ASKED}), story, tmp_path)
    [told] = asked.end("Finished")
    assert "3 of 3 steps are missing there" in told.message and "refused" in told.message.lower()


def test_parameters_are_the_same_whatever_attempt_it_is() -> None:
    one = about.parameters(a_story(training={"microBatchSize": 4, "gradientCheckpointing": "Enabled"}).run)
    other = about.parameters(a_story(training={"microBatchSize": 1}).run)
    assert one == other
    shown = about.flat(one)
    assert shown["method.lora.rank"] == "4" and shown["training.batchSize"] == "4"
    assert not [name for name in shown if name.startswith(("method.adaLora", "method.ia3", "method.virtualTokens"))]


def test_tags_name_the_object_its_artifacts_and_what_came_of_it() -> None:
    story = finished(a_story())
    story.failure = "the loss became nan"
    told = about.tags(story.run) | about.outcome(story)
    assert told["finetune.dev/finetune"] == "demo/bot"
    assert told["finetune.dev/artifacts"] == "s3://finetune/runs/0123456789abcdef"
    assert told["finetune.dev/adapter"] == "sha256:" + "c" * 64
    assert told["finetune.dev/gate-passed"] == "true"
    assert told["finetune.dev/failure"] == "the loss became nan"
