"""The sidecar of a serving pod, `python -m finetune_serving.agent`: fetches by digest, loads, proves, moves the names.

Before the engine starts it prepares what the engine starts with (base model, our middleware, the LoRA limits) and then
answers its startup probe. From then on it does one step of `plan.next_step` after the other, for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

from finetune_serving import artifact, engine_config, plan, probe
from finetune_serving.artifact import Fetched, Unservable
from finetune_serving.desired import Desired, DesiredAdapter, DesiredBase
from finetune_serving.engine import Engine, EngineAway, EngineRefused, VllmEngine
from finetune_serving.plan import Fetch, Known, Load, Measure, Refusal, Unload, model_of
from finetune_serving.report import Reporter
from finetune_serving.routes import Aliases, AliasFile, engine_name, write_aliases
from finetune_trainer.evaluation.probeprompts import prompts_for
from finetune_trainer.failures import DIGEST_MISMATCH, RunFailure
from finetune_trainer.storage.store import Store

log = logging.getLogger("agent")

POLL_SECONDS = 1.0
#: A wrong digest or a missing object may be put right in the bucket by somebody; an unreachable store comes back.
RETRY_SECONDS = 30.0
#: A busy engine can answer one question in two ways for a moment.
PROBE_ATTEMPTS = 3
BASE_RETRY_SECONDS = 5.0
#: The store's own patience per request; the agent asks again by itself, and reports in between.
STORE_WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Place:
    """The S3 server; credentials are in the environment."""

    uri: str
    endpoint: str
    region: str


@dataclass(frozen=True)
class AgentSettings:
    """All of it is set by the operator in the pod's template."""

    state: Path
    models: Path
    desired_file: Path
    storage: Place
    engine_url: str
    health_port: int
    min_lora_rank: int
    max_loaded: int
    max_loras: int
    report_url: str
    report_token: Path
    report_ca: Path

    @classmethod
    def from_environment(cls, env: dict[str, str]) -> AgentSettings:
        return cls(
            state=Path(env.get("FINETUNE_STATE_DIR", "/finetune")),
            models=Path(env.get("FINETUNE_MODELS_DIR", "/models")),
            desired_file=Path(env.get("FINETUNE_DESIRED_FILE", "/etc/finetune/desired.json")),
            storage=Place(
                env["FINETUNE_STORAGE_URI"],
                env.get("FINETUNE_STORAGE_ENDPOINT", ""),
                env.get("FINETUNE_STORAGE_REGION", ""),
            ),
            engine_url=env.get("FINETUNE_ENGINE_URL", "http://127.0.0.1:8000"),
            health_port=int(env.get("FINETUNE_HEALTH_PORT", "8001")),
            min_lora_rank=int(env.get("FINETUNE_MIN_LORA_RANK", "16")),
            max_loaded=int(env.get("FINETUNE_MAX_LOADED", "2")),
            max_loras=int(env.get("FINETUNE_MAX_LORAS", "2")),
            report_url=env.get("FINETUNE_REPORT_URL", ""),
            report_token=Path(env.get("FINETUNE_REPORT_TOKEN_FILE", "/var/run/finetune/token")),
            report_ca=Path(env.get("FINETUNE_REPORT_CA_FILE", "/var/run/finetune/ca.crt")),
        )


class Agent:
    """Owns what is known; every wait is bounded, every failure is logged, reported and tried again."""

    def __init__(self, settings: AgentSettings, store: Store) -> None:
        self.settings = settings
        self.store = store
        self.known = Known(max_loaded=settings.max_loaded)
        self.base = read_base(settings.state / "base.json")
        self.base_digest = ""
        self.message = "starting"
        self.prepared = asyncio.Event()
        self.reporter = Reporter(settings.report_url, settings.report_token, settings.report_ca)
        self._desired_stamp: tuple[int, int] | None = None
        self._fetching: asyncio.Task[Fetched] | None = None
        self._published = ""
        self._foreign = 0
        self._changed = asyncio.Event()

    # what is wanted

    def offer(self, desired: Desired) -> None:
        """Takes a desired set if it is newer than the known one; it comes from the ConfigMap and from reports."""
        if self.known.desired is not None and desired.sequence <= self.known.desired.sequence:
            return
        if self.base is not None and desired.base_model != self.base:
            if desired.sequence != self._foreign:
                log.info("desired set %d is for another base model: this pod is being replaced", desired.sequence)
                self._foreign = desired.sequence
            return
        adapters = ", ".join(f"{model_of(adapter)} weight {adapter.weight}" for adapter in desired.adapters)
        log.info("desired set %d: %s", desired.sequence, adapters)
        plan.take(self.known, desired)
        self._changed.set()

    def read_desired_file(self) -> None:
        """The kubelet replaces the file as a whole, so what is read is one version of it."""
        try:
            stat = self.settings.desired_file.stat()
            if (stat.st_ino, stat.st_mtime_ns) == self._desired_stamp:
                return
            self.offer(Desired.model_validate_json(self.settings.desired_file.read_text(encoding="utf-8")))
            self._desired_stamp = (stat.st_ino, stat.st_mtime_ns)
        except (OSError, ValueError) as error:
            log.error("%s cannot be read: %s", self.settings.desired_file, error)

    # before the engine starts

    async def prepare(self) -> None:
        """Leaves in the shared folder what the engine's command line names."""
        state = self.settings.state
        artifact.install(Path(__file__).parent, state / "python")
        write_token(state / "token")
        self.read_desired_file()
        while self.known.desired is None:
            self._say(f"waiting for {self.settings.desired_file}")
            await self._pause(POLL_SECONDS)
            self.read_desired_file()
        if not (state / "aliases.json").exists():
            write_aliases(state / "aliases.json", Aliases(names=self.known.desired.names()))
        base = await self._fetch_base()
        await self._fetch_first_adapters()
        self.known.max_lora_rank = engine_config.write(
            state / "engine.yaml",
            base,
            list(self.known.fetched.values()),
            self.settings.min_lora_rank,
            self.settings.max_loras,
        )
        self._say("")
        self.prepared.set()
        log.info("prepared: the engine may start with max-lora-rank %d", self.known.max_lora_rank)

    async def _fetch_base(self) -> Path:
        while True:
            assert self.known.desired is not None
            base = self.known.desired.base_model
            self._say(f"fetching the base model from {base.uri}")
            try:
                found = await asyncio.to_thread(artifact.fetch_base, self.store, base, self.settings.models)
                self.base, self.base_digest = base, found.digest
                engine_config.replace_file(self.settings.state / "base.json", base.model_dump_json())
                return found.path
            except RunFailure as failure:
                self._say(f"base model: {failure.message}")
                log.error("%s; trying again in %.0f s", self.message, BASE_RETRY_SECONDS)
                await self._pause(BASE_RETRY_SECONDS)
                self.read_desired_file()

    async def _fetch_first_adapters(self) -> None:
        """So that the engine is started for their ranks. One that cannot be had does not keep the others waiting."""
        assert self.known.desired is not None
        for adapter in self.known.desired.adapters:
            self._say(f"fetching {model_of(adapter)}")
            fetching = asyncio.create_task(self._fetch_adapter(adapter))
            await asyncio.wait([fetching])
            self._take_fetched(adapter, fetching)

    # one step after the other

    async def run(self, engine: Engine) -> None:
        """Never returns; cancel it."""
        while True:
            self.read_desired_file()
            await self._look(engine)
            self._publish()
            step = plan.next_step(self.known, time.monotonic())
            if step is None:
                await self._pause(POLL_SECONDS)
                continue
            try:
                await self._do(engine, step)
            except EngineAway as away:
                log.warning("the engine does not answer: %s", away)
                self.known.engine = None
                await self._pause(POLL_SECONDS)

    async def _look(self, engine: Engine) -> None:
        try:
            state = await engine.state()
            if state.boot == self.known.boot and self.known.boot:
                self.known.engine = state
                for model, refusal in plan.note_failures(self.known).items():
                    log.error("%s: %s: %s", model, refusal.reason, refusal.message)
                return
            told = AliasFile(self.settings.state / "aliases.json").read()
            plan.saw_engine(self.known, state, await engine.adapters(), told)
            log.info("engine process %s is up, loaded: %s", state.boot[:8], sorted(self.known.loaded) or "nothing")
        except EngineAway:
            self.known.engine = None
        except EngineRefused as refused:
            log.error("the engine refused the agent: %d %s", refused.status, refused.message)
            self.known.engine = None

    async def _do(self, engine: Engine, step: plan.Step) -> None:
        match step:
            case Fetch(adapter):
                self.known.fetching = adapter.digest
                self._fetching = asyncio.create_task(self._fetch_adapter(adapter))
                self._fetching.add_done_callback(lambda task: self._take_fetched(adapter, task))
            case Load(adapter):
                self.known.trying = model_of(adapter)
                await self._load(engine, adapter)
                self.known.trying = ""
            case Measure(adapter):
                self.known.trying = model_of(adapter)
                await self._measure(engine, adapter)
                self.known.trying = ""
            case Unload(model):
                await engine.unload(model)
                log.info("%s: unloaded, nothing asks for it any more", model)
                self.known.loaded.discard(model)
                self.known.verified.pop(model, None)
                self._discard_files()

    async def _fetch_adapter(self, adapter: DesiredAdapter) -> Fetched:
        adapters = self.settings.models / "adapters"
        return await asyncio.to_thread(artifact.fetch_adapter, self.store, adapter, self.base_digest, adapters)

    def _take_fetched(self, adapter: DesiredAdapter, fetching: asyncio.Task[Fetched]) -> None:
        self.known.fetching = ""
        try:
            self.known.fetched[adapter.digest] = fetching.result()
        except Unservable as failure:  # the files are what their digest says: they will not change
            self._refuse(adapter, failure.reason, failure.message, None, on_disk=True)
        except RunFailure as failure:
            # What the store does not give now it may give later; files that are wrong end a canary.
            again = last_try(adapter) if failure.reason == DIGEST_MISMATCH else RETRY_SECONDS
            self._refuse(adapter, failure.reason, failure.message, again, on_disk=True)
        except asyncio.CancelledError:
            return
        self._changed.set()

    async def _load(self, engine: Engine, adapter: DesiredAdapter) -> None:
        model, began = model_of(adapter), time.monotonic()
        try:
            await engine.load(model, str(self.known.fetched[adapter.digest].path))
        except EngineRefused as refused:
            self._refuse(adapter, "LoadFailed", f"vLLM could not load it: {refused.message}", last_try(adapter))
            return
        self.known.loaded.add(model)
        log.info("%s: loaded in %.0f ms", model, (time.monotonic() - began) * 1000)

    async def _measure(self, engine: Engine, adapter: DesiredAdapter) -> None:
        assert self.known.desired is not None
        asked, fetched = self.known.desired.probe, self.known.fetched.get(adapter.digest)
        prompts = prompts_for(asked.prompts, fetched.prompts if fetched else ())
        try:
            for _ in range(PROBE_ATTEMPTS):
                effect = await probe.measure(engine, model_of(adapter), prompts)
                if effect.clear:
                    break
                log.warning("%s: the engine's answers are too noisy to prove anything: %s", model_of(adapter), effect)
        except EngineRefused as refused:
            self._refuse(adapter, "ProbeFailed", f"vLLM refused the probe: {refused.message}", last_try(adapter))
            return
        if refusal := effect.refusal(asked.min_logprob_delta):
            self._refuse(adapter, *refusal, None if effect.clear else RETRY_SECONDS)
            return
        self.known.verified[model_of(adapter)] = effect.delta
        log.info("%s: proved, log probabilities differ by %.3g from the base's", model_of(adapter), effect.delta)

    def _refuse(
        self, adapter: DesiredAdapter, reason: str, message: str, again: float | None, *, on_disk: bool = False
    ) -> None:
        log.error("%s: %s: %s", model_of(adapter), reason, message)
        until = None if again is None else time.monotonic() + again
        trial = adapter.trial if again is None else ""
        self.known.refused[model_of(adapter)] = Refusal(reason, message, until, on_disk, trial)

    # what others are told

    def _publish(self) -> None:
        """Moves the names: middleware first, then the operator hears of it."""
        if self.known.boot:
            before, self.known.routes = self.known.routes, plan.routes(self.known)
            plan.note_unrouted(self.known, time.monotonic())
            told = plan.aliases(self.known)
            if (text := told.dumps()) != self._published:
                write_aliases(self.settings.state / "aliases.json", told)
                self._published = text
            if self.known.routes != before:
                for name, group in self.known.routes.items():
                    log.info("%s -> %s", name, ", ".join(f"{r.model} weight {r.weight}" for r in group))
        self.reporter.offer(plan.agent_report(self.known, self.message))

    def _discard_files(self) -> None:
        assert self.known.desired is not None
        wanted = {adapter.digest for adapter in self.known.desired.adapters}
        serving = {model.rpartition("@")[2] for model in self.known.loaded}
        for digest, fetched in list(self.known.fetched.items()):
            if digest not in wanted and engine_name("", digest)[1:] not in serving:
                del self.known.fetched[digest]
                artifact.discard(fetched.path)

    async def report(self) -> None:
        """Tells the operator, and takes its answer for the desired set. Never returns; cancel it."""
        async for answer in self.reporter.answers():
            try:
                self.offer(Desired.model_validate(answer))
            except ValueError as error:
                log.error("the operator's answer is not a desired set: %s", error)

    def _say(self, message: str) -> None:
        """What this pod is doing before its engine runs."""
        self.message = message
        self.reporter.offer(plan.agent_report(self.known, message))

    async def _pause(self, seconds: float) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return


def last_try(adapter: DesiredAdapter) -> float | None:
    """Seconds until an adapter is tried again; a canary has one try."""
    return None if adapter.trial else RETRY_SECONDS


def write_token(path: Path) -> None:
    """A secret of this pod alone: agent and middleware share it through the pod's own volume."""
    if not path.exists():
        engine_config.replace_file(path, secrets.token_urlsafe(32))


def read_base(path: Path) -> DesiredBase | None:
    """The base model that this pod was prepared with, by this agent or by one before it."""
    return DesiredBase.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


async def serve_health(agent: Agent, port: int) -> web.AppRunner:
    """GET /healthz: 200 once the engine may start; the agent's startup probe."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(status=200 if agent.prepared.is_set() else 503, text=agent.message or "ok")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", port).start()
    return runner


async def serve(settings: AgentSettings) -> None:
    """Runs until the pod is stopped."""
    agent = Agent(settings, Store(settings.storage, wait_seconds=STORE_WAIT_SECONDS))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = await serve_health(agent, settings.health_port)

    async def work() -> None:
        await agent.prepare()
        async with aiohttp.ClientSession() as session:
            token = (settings.state / "token").read_text(encoding="utf-8")
            await agent.run(VllmEngine(session, settings.engine_url, token))

    tasks = [asyncio.create_task(work()), asyncio.create_task(agent.report())]
    waits = [*tasks, asyncio.create_task(stop.wait())]
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await runner.cleanup()
    for task in done:
        task.result()  # a programming error ends the container, with its traceback; the kubelet starts it anew


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    asyncio.run(serve(AgentSettings.from_environment(dict(os.environ))))


if __name__ == "__main__":
    main()
