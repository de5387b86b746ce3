"""A run in MLflow: against a fake server, or a real one whose address is in FINETUNE_TEST_MLFLOW.

mlflow server --backend-store-uri sqlite:///mlflow.db --port 5000 &
FINETUNE_TEST_MLFLOW=http://127.0.0.1:5000 pytest tests/unit/trainer/test_tracking_mlflow.py
"""

import json
import os
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator.api.tracking import MLflow
from finetune_trainer.page.story import Story
from finetune_trainer.results.tracking.follow import Follower
from finetune_trainer.results.tracking.mlflow import MLflowRun
from tests.tracking_servers import FakeMLflow, served

from .test_tracking import a_story, add_steps, finished

REAL = os.environ.get("FINETUNE_TEST_MLFLOW")


@pytest.fixture
def uri() -> Iterator[str]:
    if REAL:
        yield REAL
        return
    with served(FakeMLflow()) as fake:
        yield fake.url


@pytest.fixture
def fake() -> Iterator[FakeMLflow]:
    with served(FakeMLflow()) as server:
        yield server


def of_its_own(story: Story) -> Story:
    """With another run id, so that a real server does not know it."""
    assert story.run.prepared
    prepared = story.run.prepared.model_copy(update={"run_id": uuid.uuid4().hex[:16]})
    story.run = story.run.model_copy(update={"prepared": prepared})
    return story


def brought(uri: str, story: Story, end: Any = "Finished") -> str:
    """The run's id there, once everything has arrived."""
    follower = Follower(MLflowRun(MLflow(uri=uri)), story)
    follower.start()
    follower.end(end)
    told = follower.status()
    assert told.message == ""
    return told.url.rpartition("/")[2]


def get(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(address) as answer:
        return dict(json.load(answer))


def steps_of(uri: str, run_id: str, metric: str) -> list[int]:
    """Every step of a metric's history, as often as it is in it."""
    query = f"run_id={run_id}&metric_key={metric}&max_results=1000"
    return sorted(int(one["step"]) for one in get(f"{uri}/api/2.0/mlflow/metrics/get-history?{query}")["metrics"])


def asked(uri: str, run_id: str) -> tuple[dict[str, Any], dict[str, str], dict[str, str], dict[str, Any]]:
    """info, tags, parameters and newest metrics of a run."""
    run = get(f"{uri}/api/2.0/mlflow/runs/get?run_id={run_id}")["run"]
    data = run["data"]
    return (
        run["info"],
        {one["key"]: one["value"] for one in data["tags"]},
        {one["key"]: one["value"] for one in data["params"]},
        {one["key"]: (one["value"], one["step"]) for one in data["metrics"]},
    )


def test_a_run_is_told_whole(uri: str) -> None:
    story = finished(of_its_own(a_story(steps=150)))
    info, tags, parameters, metrics = asked(uri, brought(uri, story))
    assert (info["run_name"], info["status"]) == ("demo/bot", "FINISHED")
    assert tags["finetune.dev/run"] == story.run.prepared.run_id  # type: ignore[union-attr]
    assert tags["finetune.dev/adapter"] == "sha256:" + "c" * 64
    assert parameters["method.lora.rank"] == "4"
    assert metrics["train/loss"] == (pytest.approx(2 / 150), 150)
    assert metrics["eval/loss"] == (1.5, 150) and metrics["base/loss"] == (3.0, 150)


def test_the_next_attempt_goes_on_in_the_same_run_and_doubles_no_step(uri: str) -> None:
    story = of_its_own(a_story(steps=14))
    first = brought(uri, story, "Interrupted")
    assert asked(uri, first)[0]["status"] == "KILLED"
    resumed = a_story(steps=10, training={"microBatchSize": 1})
    resumed.run = story.run.model_copy(update={"attempt": 2, "spec": resumed.run.spec})
    add_steps(resumed, 10)
    assert brought(uri, finished(resumed)) == first
    info, tags, _, metrics = asked(uri, first)
    assert (info["status"], tags["finetune.dev/attempt"]) == ("FINISHED", "2")
    assert metrics["train/loss"][1] == 20 and metrics["eval/loss"] == (1.5, 20)
    assert steps_of(uri, first, "train/loss") == list(range(1, 21))


def status_of(server: MLflow, story: Story) -> str:
    follower = Follower(MLflowRun(server), story)
    follower.start()
    follower.end("Finished")
    return follower.status().message


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "its credentials are missing, wrong or may not do this; see tracking.mlflow.credentialsSecretRef"),
        (404, "HTTP 404 in experiments/get-by-name: UNAVAILABLE not now"),
        (302, "HTTP 302 in experiments/get-by-name"),
        (503, "OSError: HTTP 503 in experiments/get-by-name"),
    ],
)
def test_a_server_that_says_no_is_named_with_what_to_do(fake: FakeMLflow, status: int, said: str) -> None:
    fake.fail = status
    assert said in status_of(MLflow(uri=fake.url), a_story(steps=1))


def test_a_run_that_was_deleted_there_is_a_message_and_no_failure(fake: FakeMLflow) -> None:
    story = a_story(steps=2)
    tracker = MLflowRun(MLflow(uri=fake.url, experiment="mine"))
    assert tracker.open(story) == 0
    assert list(fake.experiments) == ["mine"]
    fake.runs.clear()
    follower = Follower(tracker, story)
    follower._opened = True
    follower.start()
    follower.end("Finished")
    assert "2 of 2 steps are missing there: HTTP 404 in runs/log-batch" in follower.status().message


@pytest.mark.parametrize(
    ("credentials", "header"),
    [
        ({"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "secret"}, "Basic bWU6c2VjcmV0"),
        ({"MLFLOW_TRACKING_TOKEN": "abc"}, "Bearer abc"),
        ({}, None),
    ],
)
def test_credentials_are_those_of_the_environment_and_never_shown(
    fake: FakeMLflow,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    credentials: dict[str, str],
    header: str | None,
) -> None:
    caplog.set_level("DEBUG")
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    brought(fake.url, finished(a_story(steps=2)))
    assert fake.authorizations == {header}
    held = f"{caplog.text}{fake.runs}"
    assert "secret" not in held and "abc'" not in held and "bWU6" not in held
