"""A run in MLflow, by its REST API (https://mlflow.org/docs/latest/api_reference/rest-api.html).

MLflow's own client, even the skinny one, takes over two seconds to import beside the training, and brings 40 packages
(web server, Git, Databricks, telemetry) for the eight calls that are needed.
"""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_operator.api.tracking import MLflow
from finetune_trainer.page.story import Story
from finetune_trainer.results import scalars
from finetune_trainer.results.tracking import about
from finetune_trainer.results.tracking.follow import End, Lines, TrackerRefused

TIMEOUT = 10.0
STATUS: dict[End, str] = {"Finished": "FINISHED", "Failed": "FAILED", "Interrupted": "KILLED"}
# What a server takes in one call, and of one value.
MOST_METRICS, MOST_PARAMETERS, LONGEST_PARAMETER, LONGEST_TAG = 1000, 100, 500, 5000


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The address of the spec is the one that is asked, and the only one that gets the credentials."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class MLflowRun:
    """Found by the tag that carries our run id, so that every attempt goes on in the same one."""

    name: Any = "MLflow"

    def __init__(self, server: MLflow) -> None:
        self.server, self.url, self._run = server, "", ""

    def open(self, story: Story) -> int:
        """Find the run or make it; returns the newest step whose loss it has."""
        experiment = self._experiment(self.server.experiment or about.namespace(story.run))
        run = self._found(experiment, about.run_id(story.run)) or self._made(experiment, story)
        self._run = run["info"]["run_id"]
        self.url = f"{self.server.uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._run}"
        data = run.get("data", {})
        known = {parameter["key"] for parameter in data.get("params", [])}
        wanted = about.flat(about.parameters(story.run))
        parameters = _pairs({name: value for name, value in wanted.items() if name not in known}, LONGEST_PARAMETER)
        for start in range(0, len(parameters), MOST_PARAMETERS):
            self._log(params=parameters[start : start + MOST_PARAMETERS])
        self._log(tags=_pairs(about.tags(story.run), LONGEST_TAG))
        self._update("RUNNING")
        return max((int(m["step"]) for m in data.get("metrics", []) if m["key"] == scalars.LOSS), default=0)

    def log(self, lines: Lines) -> None:
        metrics = [metric for line in lines for metric in _metrics(line, scalars.of_step(line))]
        for start in range(0, len(metrics), MOST_METRICS):
            self._log(metrics=metrics[start : start + MOST_METRICS])

    def close(self, story: Story, end: End) -> None:
        final = list(_metrics(story.metrics[-1], scalars.of_evaluation(story.evaluation))) if story.metrics else []
        self._log(metrics=final, tags=_pairs(about.outcome(story), LONGEST_TAG))
        self._update(STATUS[end], end_time=_milliseconds(time.time()))

    # ---- the calls ---------------------------------------------------------------------------------------------------

    def _experiment(self, name: str) -> str:
        """Id of the experiment, which is made where there is none."""
        query = urllib.parse.urlencode({"experiment_name": name})
        try:
            found = self._call(f"experiments/get-by-name?{query}")["experiment"]
        except TrackerRefused as refusal:
            if "RESOURCE_DOES_NOT_EXIST" not in str(refusal):
                raise
            return str(self._call("experiments/create", {"name": name})["experiment_id"])
        if found.get("lifecycle_stage") == "deleted":
            raise TrackerRefused(f"tracking.mlflow.experiment: {name} is deleted there; restore it or name another one")
        return str(found["experiment_id"])

    def _found(self, experiment: str, run_id: str) -> dict[str, Any] | None:
        asked = {
            "experiment_ids": [experiment],
            "filter": f"tags.`{about.RUN_TAG}` = '{run_id}'",
            "run_view_type": "ACTIVE_ONLY",
            "max_results": 1,
        }
        runs = self._call("runs/search", asked).get("runs", [])
        return dict(runs[0]) if runs else None

    def _made(self, experiment: str, story: Story) -> dict[str, Any]:
        source = {"mlflow.source.name": "finetune-operator", "mlflow.source.type": "JOB"}
        asked = {
            "experiment_id": experiment,
            "run_name": about.name(story.run),
            "start_time": _milliseconds(story.metrics[0]["time"] if story.metrics else time.time()),
            "tags": _pairs(about.tags(story.run) | source, LONGEST_TAG),
        }
        return dict(self._call("runs/create", asked)["run"])

    def _log(self, **data: list[dict[str, Any]]) -> None:
        if any(data.values()):
            self._call("runs/log-batch", {"run_id": self._run, **data})

    def _update(self, status: str, **more: int) -> None:
        self._call("runs/update", {"run_id": self._run, "status": status, **more})

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer. Raises: TrackerRefused where the server understood and said no; OSError where it may answer later."""
        request = urllib.request.Request(
            f"{self.server.uri.rstrip('/')}/api/2.0/mlflow/{path}",
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json", **_authorization()},
        )
        try:
            with _OPENER.open(request, timeout=TIMEOUT) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise _refusal(error, path) from error
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise TrackerRefused(
                f"{self.server.uri} does not answer as an MLflow server does; correct tracking.mlflow.uri"
            ) from error


def _refusal(error: urllib.error.HTTPError, path: str) -> Exception:
    what = f"HTTP {error.code} in {path.partition('?')[0]}"
    if error.code in (401, 403):
        return TrackerRefused(
            f"{what}: its credentials are missing, wrong or may not do this; see tracking.mlflow.credentialsSecretRef"
        )
    told = f"{what}: {_told(error.read(1 << 16))}"
    return OSError(told) if error.code >= 500 or error.code in (408, 429) else TrackerRefused(told)


def _told(body: bytes) -> str:
    """What MLflow says of an error. What another server says is not repeated: status and report show this."""
    try:
        answer = json.loads(body)
        return f"{answer['error_code']} {answer['message']}"[:500]
    except (ValueError, KeyError, TypeError):
        return "this is no answer of MLflow's; correct tracking.mlflow.uri"


def _authorization() -> dict[str, str]:
    """Of the variables that MLflow's own client reads."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if not user:
        return {}
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def _metrics(line: Mapping[str, Any], values: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    moment = _milliseconds(line.get("time", 0.0))
    for key, value in values.items():
        yield {"key": key, "value": value, "timestamp": moment, "step": line["step"]}


def _pairs(values: Mapping[str, str], longest: int) -> list[dict[str, str]]:
    return [{"key": key, "value": value[:longest]} for key, value in values.items()]


def _milliseconds(moment: float) -> int:
    return int(moment * 1000)
