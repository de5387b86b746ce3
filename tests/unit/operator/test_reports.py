"""The report server, over real HTTP: who may report on what, and what becomes of it."""

import datetime as dt
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from aiohttp.test_utils import TestClient, TestServer

from finetune_operator.kube import TOKENREVIEWS, Kube, Object, Resource
from finetune_operator.queue import Key, WorkQueue
from finetune_operator.reports import Reports, application
from finetune_operator.tokens import Tokens
from tests.unit.operator.memory_kube import MemoryKube
from tests.unit.operator.wrappers import NOW

PATH = "/apis/finetune.dev/v1alpha1/namespaces/demo/finetunes/bot/report"
AGENT_PATH = "/apis/finetune.dev/v1alpha1/namespaces/demo/adapterdeployments/bot/report"
BOT = Key("FineTune", "demo", "bot")
DEPLOYMENT = Key("AdapterDeployment", "demo", "bot")

Http = TestClient[Any, Any]


class ReviewingKube(MemoryKube):
    """Knows tokens: `tokens` maps a token to the status of its TokenReview."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[str, Object] = {}

    async def create(self, resource: Resource, body: Object) -> Object:
        if resource is not TOKENREVIEWS:
            return await super().create(resource, body)
        self._called("create", resource)
        assert body["spec"]["audiences"] == ["finetune-operator"]
        return {**body, "status": self.tokens.get(body["spec"]["token"], {"authenticated": False})}

    def add_pod(self, name: str, labels: Object, job: str = "", token: str = "") -> None:
        owners = [{"kind": "Job", "name": job, "uid": f"uid-{job}", "controller": True}] if job else []
        meta = {"name": name, "namespace": "demo", "uid": f"uid-{name}", "labels": labels, "ownerReferences": owners}
        self.objects["Pod", "demo", name] = {"metadata": meta}
        self.tokens[token or name] = {
            "authenticated": True,
            "audiences": ["finetune-operator"],
            "user": {
                "username": "system:serviceaccount:demo:default",
                "extra": {
                    "authentication.kubernetes.io/pod-name": [name],
                    "authentication.kubernetes.io/pod-uid": [f"uid-{name}"],
                },
            },
        }


class Bench:
    """A report server with everything around it."""

    def __init__(self) -> None:
        self.kube, self.queue, self.leading, self.now = ReviewingKube(), WorkQueue(), True, NOW
        self.reports = Reports(self.queue, lambda: self.now)
        self.app = application(self.reports, Tokens(cast(Kube, self.kube)), lambda: self.leading)
        self.kube.add_pod("bot-train-1-x", {"finetune.dev/finetune": "bot"}, "bot-train-1", token="good")
        self.kube.add_pod("bot-agent", {"finetune.dev/adapterdeployment": "bot"}, token="agent")


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
async def http(bench: Bench) -> AsyncIterator[Http]:
    async with TestClient(TestServer(bench.app)) as client:
        yield client


async def send(http: Http, token: str | None = "good", path: str = PATH, **body: Any) -> tuple[int, Object]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with http.post(path, json={"job": "bot-train-1", **body}, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_a_report_of_the_runs_own_pod_is_kept_and_has_the_object_looked_at(bench: Bench, http: Http) -> None:
    assert await send(http, progress={"step": 3}) == (200, {})
    report = bench.reports.of(BOT)["bot-train-1-x"]
    assert (report.job, report.job_uid, report.body["progress"]) == ("bot-train-1", "uid-bot-train-1", {"step": 3})
    assert await bench.queue.get() == BOT


@pytest.mark.parametrize(
    ("token", "status", "says"),
    [
        (None, 401, "Authorization"),
        ("unknown", 401, "not valid for audience"),
        ("other-audience", 401, "not valid for audience"),
        ("a-person", 403, "not bound to a pod"),
        ("agent", 403, "does not belong to FineTune demo/bot"),
        ("other-run", 403, "does not belong to FineTune demo/bot"),
        ("gone", 403, "is gone"),
        ("no-job", 403, "belongs to no Job"),
        ("second", 403, "is not the first of Job bot-train-1"),
    ],
)
async def test_others_are_refused_with_a_reason(
    bench: Bench, http: Http, token: str | None, status: int, says: str
) -> None:
    kube = bench.kube
    kube.add_pod("other-run", {"finetune.dev/finetune": "other"}, "other-train-1")
    kube.add_pod("no-job", {"finetune.dev/finetune": "bot"})
    second = {"finetune.dev/finetune": "bot", "batch.kubernetes.io/job-completion-index": "1"}
    kube.add_pod("second", second, "bot-train-1")
    kube.add_pod("gone", {"finetune.dev/finetune": "bot"}, "bot-train-1")
    del kube.objects["Pod", "demo", "gone"]
    # An API server that knows no audiences answers without them.
    kube.tokens["other-audience"] = {**kube.tokens["good"], "audiences": []}
    kube.tokens["a-person"] = {**kube.tokens["good"], "user": {"username": "jane"}}
    answered, answer = await send(http, token)
    assert answered == status and says in answer["message"]
    assert not bench.reports.of(BOT)


async def test_a_pod_may_not_report_for_another_job_of_its_object(bench: Bench, http: Http) -> None:
    status, answer = await send(http, job="bot-train-2")
    assert status == 403 and "bot-train-2" in answer["message"]


async def test_a_pod_of_the_same_name_in_a_later_life_is_another_pod(bench: Bench, http: Http) -> None:
    bench.kube.objects["Pod", "demo", "bot-train-1-x"]["metadata"]["uid"] = "another"
    assert (await send(http))[0] == 403


async def test_many_reports_cost_one_review(bench: Bench, http: Http) -> None:
    for step in range(20):
        await send(http, progress={"step": step})
    assert bench.kube.requests == [("create", "TokenReview"), ("get", "Pod")]


async def test_a_follower_takes_no_reports(bench: Bench, http: Http) -> None:
    bench.leading = False
    status, answer = await send(http)
    assert status == 503 and "not the leader" in answer["message"]


async def test_an_api_server_that_does_not_answer_is_no_verdict_about_the_token(bench: Bench, http: Http) -> None:
    bench.kube.unreachable = True
    assert (await send(http))[0] == 503


async def test_neither_progress_nor_result_wipes_the_other(bench: Bench, http: Http) -> None:
    await send(http, progress={"step": 40})
    await send(http, result={"stage": "train"})
    await send(http, progress={"step": 39})
    body = bench.reports.of(BOT)["bot-train-1-x"].body
    assert body["result"] == {"stage": "train"} and body["progress"] == {"step": 39}


async def test_an_agent_is_answered_what_is_desired(bench: Bench, http: Http) -> None:
    assert await send(http, "agent", AGENT_PATH) == (200, {})
    bench.reports.set_desired(DEPLOYMENT, {"adapters": [{"name": "bot"}]})
    assert await send(http, "agent", AGENT_PATH) == (200, {"adapters": [{"name": "bot"}]})
    assert "bot-agent" in bench.reports.of(DEPLOYMENT)


async def test_a_report_that_says_nothing_new_is_kept_and_costs_no_look(bench: Bench, http: Http) -> None:
    bench.kube.add_pod("agent-1", {"finetune.dev/adapterdeployment": "bot"})
    looked = []
    for body in ({"ready": False}, {"ready": False}, {"ready": True}):
        bench.now += dt.timedelta(seconds=5)
        await http.post(AGENT_PATH, json=body, headers={"Authorization": "Bearer agent-1"})
        assert bench.reports.of(DEPLOYMENT)["agent-1"].received == bench.now
        looked.append(len(bench.queue) == 1)
        if looked[-1]:
            bench.queue.done(await bench.queue.get())
    assert looked == [True, False, True]


async def test_what_is_no_json_object_or_too_big_or_nowhere_is_refused(http: Http) -> None:
    headers = {"Authorization": "Bearer good"}
    for data, status in ((b"{", 400), (b"[]", 400), (b"{" + b" " * 300_000 + b"}", 413)):
        async with http.post(PATH, data=data, headers=headers) as answer:
            assert answer.status == status
    async with http.post(PATH.replace("finetunes", "pods"), json={}, headers=headers) as answer:
        assert answer.status == 404


async def test_the_reports_of_an_object_that_is_gone_are_forgotten(bench: Bench, http: Http) -> None:
    await send(http)
    bench.reports.forget(BOT)
    assert not bench.reports.of(BOT)
