"""The agent against a real MinIO and a fake engine behind the real middleware."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from finetune_serving import agent as agents
from finetune_serving import plan
from finetune_serving import report as reports
from finetune_serving.agent import Agent, AgentSettings, Place
from finetune_trainer.digest import hash_tree, hex_of, short, tree_digest
from finetune_trainer.storage.store import Store
from tests.unit.serving.fake_engine import Client, FakeEngine
from tests.unit.trainer.minio_server import minio_binary, minio_server

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
BASE_FILES = {"config.json": "{}", "model.safetensors": "weights of the base model", "tokenizer.json": "{}"}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if minio_binary() is None:
        pytest.skip("no minio binary: run `make tools`")
    with minio_server(tmp_path_factory.mktemp("minio")) as url:
        yield url


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's own waits, made short."""
    monkeypatch.setattr(agents, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(agents, "BASE_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(agents, "RETRY_SECONDS", 0.3)
    monkeypatch.setattr(plan, "RETIRE_SECONDS", 0.1)
    monkeypatch.setattr(reports, "EVERY_SECONDS", 0.1)
    monkeypatch.setattr(reports, "SETTLE_SECONDS", 0.01)


class Pod:
    """One serving pod: its volumes, its agent, its engine; the bucket is the module's."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        for name in ("state", "models", "etc"):
            (folder / name).mkdir()
        self.folder, self.endpoint = folder, endpoint
        self.store = Store(Place("s3://finetune/" + folder.name, endpoint, "us-east-1"), wait_seconds=1)
        self.settings = replace(
            AgentSettings.from_environment({"FINETUNE_STORAGE_URI": self.store.uri()}),
            state=folder / "state",
            models=folder / "models",
            desired_file=folder / "etc/desired.json",
            storage=Place(self.store.uri(), endpoint, "us-east-1"),
            report_token=folder / "etc/token",
        )
        (folder / "etc/token").write_text("the pod's token")
        self.engine = FakeEngine(folder / "state")
        self.base = self.upload("base", BASE_FILES, "models/base")
        self.digests: dict[str, str] = {}
        self.sequence = 0

    def upload(self, name: str, files: dict[str, str], prefix: str = "", **manifest: Any) -> str:
        directory = self.folder / "upload" / name
        directory.mkdir(parents=True)
        for path, text in files.items():
            (directory / path).write_text(text)
        digest = tree_digest(hash_tree(directory))
        self.store.upload_tree(directory, prefix or f"adapters/{hex_of(digest)}", manifest)
        return digest

    def adapter(self, name: str, weights: str = "", base: str = "", **config: Any) -> str:
        """Uploads an adapter; returns the engine's name of it, as `bot`."""
        files = {
            "adapter_config.json": json.dumps({**CONFIG, **config}),
            "adapter_model.safetensors": weights or f"weights of {name}",
        }
        self.digests[name] = self.upload(name, files, baseModel={"digest": base or self.base})
        return f"bot@{short(self.digests[name])}"

    def want(self, *names: str, base: str = "", **probe: Any) -> dict[str, Any]:
        """Writes the desired set, `name`, `name*weight` or `name*weight*trial`, as the kubelet does: as a new file."""
        self.sequence += 1
        adapters = []
        for entry in names:
            name, weight, trial, *_ = [*entry.split("*"), "", ""]
            digest = self.digests[name]
            uri = self.store.uri(f"adapters/{hex_of(digest)}")
            adapters.append({"name": "bot", "digest": digest, "uri": uri, "weight": int(weight or 100), "trial": trial})
        document = {
            "sequence": self.sequence,
            "baseModel": {"uri": self.store.uri("models/base"), "digest": base or self.base},
            "adapters": adapters,
            "probe": {"minLogprobDelta": 0.001, **probe},
        }
        draft = self.settings.desired_file.with_name("new")
        draft.write_text(json.dumps(document))
        os.replace(draft, self.settings.desired_file)
        return document

    @asynccontextmanager
    async def running(self, report_url: str = "") -> AsyncIterator[Agent]:
        """An agent at work, from its start."""
        running = Agent(replace(self.settings, report_url=report_url), self.store)

        async def work() -> None:
            await running.prepare()
            await running.run(Client(self.engine, (self.settings.state / "token").read_text()))

        tasks = [asyncio.create_task(work()), asyncio.create_task(running.report())]
        try:
            yield running
            for task in tasks:
                assert not task.done() or task.exception() is None, task.exception()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def ask(self, model: str = "bot") -> tuple[int, str]:
        """(status, model that answered)"""
        status, body = await self.engine.call("POST", "/v1/completions", {"model": model, "prompt": "Hello"})
        return status, body.get("model", "")

    async def ready(self) -> bool:
        return (await self.engine.call("GET", "/finetune/ready"))[0] == 200


async def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while True:
            held = condition()
            if await held if asyncio.iscoroutine(held) else held:
                return
            await asyncio.sleep(0.01)


def state(agent: Agent, index: int = 0) -> tuple[str, str]:
    found = plan.adapter_reports(agent.known)
    return (found[index].state, found[index].reason) if len(found) > index else ("", "")


@pytest.fixture
def pod(tmp_path: Path, endpoint: str) -> Pod:
    return Pod(tmp_path, endpoint)


async def test_a_pod_prepares_its_engine_and_is_ready_when_the_adapter_is_proved(pod: Pod) -> None:
    model = pod.adapter("a", r=20)
    pod.want("a")
    pod.engine.up = False
    async with pod.running() as agent:
        await until(agent.prepared.is_set)
        config = yaml.safe_load((pod.settings.state / "engine.yaml").read_text())
        assert config["max-lora-rank"] == 32, "the next that vLLM takes above 20"
        assert (Path(config["model"]) / "model.safetensors").read_text() == "weights of the base model"
        assert (pod.settings.state / "python/finetune_serving/middleware.py").exists()
        assert (pod.settings.state / "token").stat().st_mode & 0o777 == 0o600
        assert (await pod.ask())[0] == 503 and state(agent)[0] == "WaitingForEngine"
        pod.engine.up = True
        await until(pod.ready)
        assert await pod.ask() == (200, model)
        assert state(agent)[0] == "Ready" and pod.engine.probes.count(model) > 0


async def test_a_swap_fails_no_request_and_unloads_the_old_one_after_its_last_answer(pod: Pod) -> None:
    old, new = pod.adapter("a"), pod.adapter("b")
    pod.want("a")
    answered: list[tuple[int, str]] = []
    async with pod.running():
        await until(pod.ready)
        answer = pod.engine.hold_answers = asyncio.Event()
        slow = asyncio.create_task(pod.ask())
        await until(lambda: pod.engine.held)
        pod.engine.hold_answers = None
        pod.want("b")

        async def swapped() -> bool:
            answered.append(await pod.ask())
            return answered[-1][1] == new

        await until(swapped)
        assert old in pod.engine.loaded, "a request of it is still being answered"
        answer.set()
        assert await slow == (200, old)
        await until(lambda: old not in pod.engine.loaded)
        assert {status for status, _ in answered} == {200} and await pod.ready()
        assert not (pod.settings.models / "adapters" / hex_of(pod.digests["a"])).exists()


async def test_a_canary_is_shared_by_weight_and_rolled_back_without_loading(pod: Pod) -> None:
    old, new = pod.adapter("a"), pod.adapter("b")
    pod.want("a*50", "b*50")
    async with pod.running() as agent:
        await until(lambda: len(agent.known.verified) == 2)
        await until(pod.ready)
        assert {(await pod.ask())[1] for _ in range(60)} == {old, new}
        pod.want("a*100", "b*0")

        async def only_old() -> bool:
            return {(await pod.ask())[1] for _ in range(20)} == {old}

        await until(only_old)
        assert sorted(pod.engine.loads) == sorted([old, new])


async def test_a_canary_that_fails_a_request_is_dropped_and_no_client_notices(pod: Pod) -> None:
    old, new = pod.adapter("a"), pod.adapter("b")
    pod.want("a*50", "b*50*first")
    async with pod.running() as agent:
        await until(lambda: len(agent.known.verified) == 2)
        pod.engine.fail_answers = {new}
        answered: list[tuple[int, str]] = []

        async def dropped() -> bool:
            answered.append(await pod.ask())
            return state(agent, 1) == ("Failed", "RequestsFailed")

        await until(dropped)
        assert set(answered) == {(200, old)}
        await until(lambda: new not in pod.engine.loaded)
        loads = len(pod.engine.loads)
        pod.want("a*50", "b*50*first")  # the same trial in a newer set
        await until(lambda: agent.known.desired is not None and agent.known.desired.sequence == 2)
        await until(lambda: state(agent, 1) == ("Failed", "RequestsFailed"))
        assert len(pod.engine.loads) == loads and await pod.ready()
        pod.engine.fail_answers = set()
        pod.want("a*50", "b*50*second")
        await until(lambda: state(agent, 1)[0] == "Ready")

        async def both() -> bool:
            return {(await pod.ask()) for _ in range(20)} == {(200, old), (200, new)}

        await until(both)


@pytest.mark.parametrize(
    "trouble, reason", [("load", "LoadFailed"), ("effect", "NoEffect"), ("digest", "DigestMismatch")]
)
async def test_a_canary_that_cannot_be_served_has_one_try(pod: Pod, trouble: str, reason: str) -> None:
    old = pod.adapter("a")
    new = pod.adapter("b", weights="no effect" if trouble == "effect" else "")
    if trouble == "digest":
        pod.store.put_bytes(f"adapters/{hex_of(pod.digests['b'])}/adapter_model.safetensors", b"WEIGHTS OF b")
    pod.want("a")
    async with pod.running() as agent:
        await until(pod.ready)
        pod.engine.fail_loads = ["CUDA error"] if trouble == "load" else []
        pod.want("a*50", "b*50*first")
        await until(lambda: state(agent, 1) == ("Failed", reason))
        assert agent.known.refused[new].again is None and agent.known.refused[new].trial == "first"
        assert {await pod.ask() for _ in range(20)} == {(200, old)} and await pod.ready()


async def test_an_engine_that_dies_with_a_canary_comes_back_without_it(pod: Pod) -> None:
    old, new = pod.adapter("a"), pod.adapter("b")
    pod.want("a*50", "b*50*first")
    async with pod.running() as agent:
        await until(lambda: len(agent.known.verified) == 2 and len(agent.known.routes["bot"]) == 2)
        pod.engine.restart()
        await until(lambda: state(agent, 1) == ("Failed", "EngineRestarted"))
        await until(pod.ready)
        assert {await pod.ask() for _ in range(20)} == {(200, old)}
        assert pod.engine.loads.count(new) == 1


async def test_an_adapter_without_effect_never_makes_a_pod_ready(pod: Pod) -> None:
    pod.adapter("z", weights="no effect")
    pod.want("z")
    async with pod.running() as agent:
        await until(lambda: state(agent) == ("Failed", "NoEffect"))
        assert not await pod.ready() and (await pod.ask())[0] == 503
        await until(lambda: not pod.engine.loaded)
        assert "answers exactly like the base model" in plan.aliases(agent.known).message


async def test_a_new_adapter_without_effect_leaves_the_old_one_in_service(pod: Pod) -> None:
    old = pod.adapter("a")
    pod.adapter("z", weights="no effect")
    pod.want("a")
    async with pod.running() as agent:
        await until(pod.ready)
        pod.want("z", "a*0")
        await until(lambda: state(agent) == ("Failed", "NoEffect"))
        assert await pod.ready() and await pod.ask() == (200, old)


async def test_a_file_that_was_changed_in_the_bucket_is_never_loaded(pod: Pod) -> None:
    pod.adapter("a")
    key = f"adapters/{hex_of(pod.digests['a'])}/adapter_model.safetensors"
    pod.store.put_bytes(key, b"WEIGHTS OF a")
    pod.want("a")
    async with pod.running() as agent:
        await until(lambda: state(agent) == ("Failed", "DigestMismatch"))
        await until(agent.prepared.is_set)
        assert not await pod.ready() and pod.engine.loads == []
        pod.store.put_bytes(key, b"weights of a")  # put right: tried again by itself
        await until(pod.ready)


@pytest.mark.parametrize(
    "config, reason, words",
    [
        ({"peft_type": "PREFIX_TUNING"}, "UnsupportedAdapter", "train with method.type LoRA or QLoRA"),
        ({"peft_type": "IA3"}, "UnsupportedAdapter", "mode: Merge"),
        ({"use_dora": True}, "UnsupportedAdapter", "use_dora; serve it with mode: Merge"),
        ({"modules_to_save": ["lm_head"]}, "UnsupportedAdapter", "modules_to_save"),
        ({"bias": "all"}, "UnsupportedAdapter", "bias all"),
        ({"init_lora_weights": "pissa"}, "UnsupportedAdapter", "init_lora_weights pissa"),
        ({"base": "sha256:" + "0" * 64}, "BaseModelMismatch", "was trained on base model"),
    ],
)
async def test_what_vllm_would_serve_wrongly_is_refused_with_the_way_out(
    pod: Pod, config: dict[str, Any], reason: str, words: str
) -> None:
    pod.adapter("a", **config)
    pod.want("a")
    async with pod.running() as agent:
        await until(lambda: state(agent) == ("Failed", reason))
        assert words in plan.adapter_reports(agent.known)[0].message and pod.engine.loads == []


async def test_a_rank_above_the_engines_is_said_and_the_old_adapter_stays(pod: Pod) -> None:
    old = pod.adapter("a")
    pod.adapter("big", rank_pattern={"q_proj": 64})
    pod.want("a")
    async with pod.running() as agent:
        await until(pod.ready)
        pod.want("big", "a*0")
        await until(lambda: state(agent) == ("Failed", "RankTooLarge"))
        assert plan.adapter_reports(agent.known)[0].rank == 64
        assert await pod.ask() == (200, old) and await pod.ready()


async def test_after_an_engine_restart_the_adapter_is_loaded_before_the_pod_is_ready(pod: Pod) -> None:
    model = pod.adapter("a")
    pod.want("a")
    async with pod.running():
        await until(pod.ready)
        load = pod.engine.hold_loads = asyncio.Event()
        pod.engine.restart()
        assert not await pod.ready() and (await pod.ask())[0] == 503
        load.set()
        await until(pod.ready)
        assert await pod.ask() == (200, model) and pod.engine.loads == [model, model]


async def test_an_agent_restart_is_not_noticed(pod: Pod) -> None:
    model = pod.adapter("a")
    pod.want("a")
    async with pod.running():
        await until(pod.ready)
    probes = len(pod.engine.probes)
    assert await pod.ready() and await pod.ask() == (200, model), "without any agent"
    async with pod.running() as agent:
        await until(lambda: state(agent)[0] == "Ready")
        assert await pod.ready() and pod.engine.loads == [model] and len(pod.engine.probes) == probes


async def test_a_load_that_failed_is_tried_again(pod: Pod) -> None:
    pod.adapter("a")
    pod.want("a")
    pod.engine.fail_loads = ["CUDA error"]
    async with pod.running() as agent:
        await until(lambda: state(agent) == ("Failed", "LoadFailed"))
        await until(pod.ready)


async def test_a_set_for_another_base_model_is_left_to_other_pods(pod: Pod) -> None:
    model = pod.adapter("a")
    pod.adapter("b")
    pod.want("a")
    async with pod.running() as agent:
        await until(pod.ready)
        pod.want("b", base="sha256:" + "1" * 64)
        await asyncio.sleep(0.3)
        assert await pod.ask() == (200, model) and agent.known.desired is not None
        assert agent.known.desired.sequence == 1


async def test_a_base_model_without_a_known_digest_is_checked_against_the_adapters(pod: Pod) -> None:
    pod.adapter("a")
    pod.adapter("foreign", base="sha256:" + "2" * 64)
    for name in pod.store.list("models/base"):
        if name.key.endswith("manifest.json"):
            pod.store.delete(name.key)
    known, pod.base = pod.base, ""
    pod.want("a", "foreign*0")
    async with pod.running() as agent:
        await until(pod.ready)
        assert agent.base_digest == known
        assert state(agent, 1) == ("Failed", "BaseModelMismatch")


async def test_half_a_base_model_is_waited_for(pod: Pod) -> None:
    pod.adapter("a")
    pod.store.delete("models/base/manifest.json")
    pod.store.delete("models/base/tokenizer.json")
    pod.base = ""
    pod.want("a")
    async with pod.running() as agent:
        await until(lambda: "has no tokenizer" in agent.message)
        pod.store.put_bytes("models/base/tokenizer.json", b"{}")
        await until(pod.ready)


async def test_a_store_that_is_away_is_waited_for_visibly(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    pod = Pod(tmp_path, endpoint)
    pod.adapter("a")
    pod.want("a")
    away = Store(Place(pod.store.uri(), "http://127.0.0.1:9", "us-east-1"), wait_seconds=0.2)
    real, pod.store = pod.store, away
    with caplog.at_level(logging.INFO):
        async with pod.running() as agent:
            await until(lambda: "did not answer" in agent.message)
            assert not agent.prepared.is_set()
            agent.store = real
            await until(pod.ready)
    assert "trying again" in caplog.text


async def test_reports_bring_the_next_desired_set_at_once(pod: Pod) -> None:
    pod.adapter("a")
    new = pod.adapter("b")
    first = pod.want("a")
    second = pod.want("b")
    pod.settings.desired_file.write_text(json.dumps(first))  # the kubelet is late
    received: list[dict[str, Any]] = []
    answers = [first]

    async def receive(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer the pod's token"
        received.append(await request.json())
        return web.json_response(answers[-1])

    app = web.Application()
    app.router.add_post("/report", receive)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with pod.running(f"http://127.0.0.1:{port}/report"):
            await until(pod.ready)
            await until(lambda: received[-1]["ready"])
            assert received[-1]["adapters"][0]["state"] == "Ready" and received[-1]["maxLoraRank"] == 16
            answers.append(second)

            async def swapped() -> bool:
                return await pod.ask() == (200, new)

            await until(swapped)
            await until(lambda: received[-1]["served"] == {"bot": [{"model": new, "weight": 100, "trial": ""}]})
            assert received[-1]["sequence"] == 2
    finally:
        await runner.cleanup()
