"""Reports against a real HTTP server: rate, wire format, and that a failing one never stops a run."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api.finetunestatus import ProgressStatus
from finetune_trainer.report import Reporter, trainer_status
from finetune_trainer.runspec import Failure, Result, RunSpec, Storage

from .tiny import finetune_spec

PROGRESS = ProgressStatus(
    step=12, total_steps=40, epoch=0.3, loss=1.5, learning_rate=2e-4, tokens_per_second=81.5, eta_seconds=28
)


class Operator:
    """A report server that keeps what it is told and answers `status`."""

    def __init__(self) -> None:
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.statuses: list[int] = []
        operator = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                operator.received.append((self.headers["Authorization"], body))
                self.send_response(operator.statuses.pop(0) if operator.statuses else 200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/report"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def operator() -> Iterator[Operator]:
    operator = Operator()
    yield operator
    operator.server.shutdown()
    operator.server.server_close()


def reporter(url: str | None, tmp_path: Path, interval: float = 5.0) -> Reporter:
    run = RunSpec(
        stage="train", namespace="demo", name="tiny", job="tiny-train-1", spec=finetune_spec(),
        storage=Storage(uri="s3://finetune"), report_url=url,
    )  # fmt: skip
    (tmp_path / "token").write_text("a-token\n")
    return Reporter(run, token=tmp_path / "token", ca=tmp_path / "none", interval=interval)


def test_progress_is_sent_at_most_once_per_interval_with_the_pods_token(operator: Operator, tmp_path: Path) -> None:
    sender = reporter(operator.url, tmp_path)
    assert sender.progress(PROGRESS)
    assert not sender.progress(PROGRESS)
    sender._sending.join()  # type: ignore[union-attr]
    ((token, body),) = operator.received
    assert token == "Bearer a-token"
    assert body["job"] == "tiny-train-1"
    assert body["progress"]["totalSteps"] == 40
    assert body["progress"]["reportedAt"].endswith("Z")


def test_what_the_pod_is_at_is_told_in_this_order(operator: Operator, tmp_path: Path) -> None:
    sender = reporter(operator.url, tmp_path)
    sender.loads()
    sender.begins(4)
    sender._sending.join()  # type: ignore[union-attr]
    sender.waits("uploading s3://finetune/x: http://minio:9000 does not answer")
    sender.waits("")
    told = [{key: value for key, value in body.items() if key != "job"} for _, body in operator.received]
    assert told == [
        {"loading": True},
        {"loading": False, "microBatch": 4},
        {"waitsFor": "uploading s3://finetune/x: http://minio:9000 does not answer"},
        {"waitsFor": ""},
    ]


def test_of_several_processes_the_first_one_speaks(
    operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    sender = reporter(operator.url, tmp_path)
    sender.loads()
    sender.waits("downloading s3://finetune/x: http://minio:9000 does not answer")
    assert not sender.progress(PROGRESS)
    assert operator.received == []


def test_trainer_status_has_kubeflows_fields() -> None:
    status = trainer_status(PROGRESS.model_copy(update={"reported_at": "2026-01-01T00:00:00Z"}))
    assert status["progressPercentage"] == 30
    assert status["estimatedRemainingSeconds"] == 28
    assert {"name": "loss", "value": "1.5"} in status["metrics"]
    assert all(isinstance(metric["value"], str) for metric in status["metrics"])
    assert status["lastUpdatedTime"] == "2026-01-01T00:00:00Z"


def test_a_result_is_sent_again_until_it_is_taken(operator: Operator, tmp_path: Path) -> None:
    operator.statuses = [503, 503]
    result = Result(stage="train", job="tiny-train-1", failure=Failure(reason="NonFiniteLoss", message="why"))
    assert reporter(operator.url, tmp_path).result(result)
    assert len(operator.received) == 3
    assert operator.received[-1][1]["result"]["failure"] == {"reason": "NonFiniteLoss", "message": "why"}


def test_an_operator_that_is_away_costs_nothing_but_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sender = reporter("http://127.0.0.1:9/report", tmp_path)
    sender.progress(PROGRESS)
    sender._sending.join()  # type: ignore[union-attr]
    assert "training goes on" in caplog.text


def test_without_an_address_nothing_is_sent(tmp_path: Path) -> None:
    sender = reporter(None, tmp_path)
    assert not sender.progress(PROGRESS)
    assert not sender.result(Result(stage="train", job="x", failure=Failure(reason="InternalError")))
