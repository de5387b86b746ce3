"""A run in Weights & Biases: the real library and its uploading process, against a fake server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api.finetunestatus import TrackerStatus
from finetune_operator.api.tracking import WandB
from finetune_trainer.page.story import Story
from finetune_trainer.results.tracking.follow import Follower
from finetune_trainer.results.tracking.wandb import WandBRun
from tests.tracking_servers import FakeWandB, served

from .test_tracking import a_story, add_steps, finished

KEY = "0123456789" * 4


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeWandB]:
    import wandb

    monkeypatch.setattr("finetune_trainer.results.tracking.wandb.FINISH_TIMEOUT", 120.0)
    monkeypatch.setattr("finetune_trainer.results.tracking.wandb.TIMEOUT", 120.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with served(FakeWandB()) as server:
        yield server
    wandb.teardown()


def brought(fake: FakeWandB, folder: Path, story: Story, end: Any = "Finished") -> TrackerStatus:
    server = WandB.model_validate({"baseUrl": fake.url, "apiKeySecretRef": {"name": "wandb"}})
    follower = Follower(WandBRun(server, folder), story)
    follower.start()
    follower.end(end)
    return follower.status()


def test_every_attempt_goes_on_in_one_run_and_doubles_no_step(fake: FakeWandB, tmp_path: Path) -> None:
    assert brought(fake, tmp_path / "one", a_story(steps=14), "Interrupted").message == ""
    assert [line["_step"] for line in fake.history] == list(range(1, 15))
    resumed = a_story(steps=10)
    resumed.run = resumed.run.model_copy(update={"attempt": 2})
    add_steps(resumed, 10)
    told = brought(fake, tmp_path / "two", finished(resumed))
    assert told.message == "" and told.url == f"{fake.url}/acme/demo/runs/0123456789abcdef"
    assert [line["_step"] for line in fake.history] == list(range(1, 21))
    assert fake.history[13]["train/loss"] == pytest.approx(2 / 14)
    assert fake.history[-1]["eval/loss"] == 1.5 and fake.history[-1]["base/loss"] == 3.0
    assert fake.exit_codes == [143, 0]
    assert set(fake.names) == {"demo/bot"}
    assert fake.config["method"]["value"]["lora"]["rank"] == 4
    assert fake.config["finetune.dev/attempt"]["value"] == "2"
    assert fake.summary["finetune.dev/adapter"] == "sha256:" + "c" * 64

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert not (tmp_path / "home").exists(), "nothing is written outside the work folder"
    assert {"program", "host", "os", "gpu"}.isdisjoint(fake.config["_wandb"]["value"])


def test_a_key_that_is_refused_is_a_message(fake: FakeWandB, tmp_path: Path) -> None:
    fake.fail = 401
    told = brought(fake, tmp_path, a_story(steps=2))
    assert "2 of 2 steps are missing there" in told.message and "see tracking.wandb and its API key" in told.message
    assert KEY not in told.message


def test_without_a_key_it_says_where_the_key_belongs(
    fake: FakeWandB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    told = brought(fake, tmp_path, a_story(steps=2))
    assert "the Secret of tracking.wandb.apiKeySecretRef is missing or has no such key" in told.message
