"""Which one thing the agent does next, and what it tells middleware and operator: pure functions of what it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_serving.artifact import Fetched
from finetune_serving.desired import AdapterReport, AgentReport, Desired, DesiredAdapter, ServedRoute
from finetune_serving.engine import EngineState
from finetune_serving.routes import Aliases, Route, engine_name

#: A request may have read the old mapping just before it was replaced and reach the engine just after.
RETIRE_SECONDS = 10.0


@dataclass(frozen=True)
class Refusal:
    """Why an adapter is not served; tried again at `again` (monotonic seconds), or never for this desired set."""

    reason: str
    message: str
    again: float | None = None
    #: About the files, not about what this engine process made of them.
    on_disk: bool = False
    #: The canary's trial that has failed with this: neither another set nor another engine process revives it.
    trial: str = ""


@dataclass
class Known:
    """Everything the agent knows. Digests index what is on disk, engine names what is in the engine's process."""

    desired: Desired | None = None
    #: The engine as last seen, None while it does not answer; `boot` stays, since a busy engine is not a restarted one.
    engine: EngineState | None = None
    boot: str = ""
    max_lora_rank: int = 0
    #: Never more adapters at once in the engine, even while names move from old to new.
    max_loaded: int = 2
    fetched: dict[str, Fetched] = field(default_factory=dict)
    fetching: str = ""
    #: The engine name that is being loaded or probed.
    trying: str = ""
    loaded: set[str] = field(default_factory=set)
    verified: dict[str, float] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    #: engine name -> since when no route leads to it
    unrouted: dict[str, float] = field(default_factory=dict)
    routes: dict[str, tuple[Route, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Fetch:
    adapter: DesiredAdapter


@dataclass(frozen=True)
class Load:
    adapter: DesiredAdapter


@dataclass(frozen=True)
class Measure:
    adapter: DesiredAdapter


@dataclass(frozen=True)
class Unload:
    model: str


Step = Fetch | Load | Measure | Unload


def model_of(adapter: DesiredAdapter) -> str:
    return engine_name(adapter.name, adapter.digest)


def take(known: Known, desired: Desired) -> None:
    """A new set may have a new address, other probe prompts, or be a wish to try again; a failed trial stays failed."""
    known.desired = desired
    trials = {model_of(adapter): adapter.trial for adapter in desired.adapters if adapter.trial}
    known.refused = {
        m: refusal for m, refusal in known.refused.items() if refusal.trial and refusal.trial == trials.get(m)
    }


def blocked(known: Known, adapter: DesiredAdapter, now: float) -> bool:
    refusal = known.refused.get(model_of(adapter))
    return refusal is not None and (refusal.again is None or refusal.again > now)


def next_step(known: Known, now: float) -> Step | None:
    """First prove what is loaded, then load what is on disk, then download what is missing, then drop what is old."""
    if known.desired is None:
        return None
    waiting = [a for a in known.desired.adapters if model_of(a) not in known.verified and not blocked(known, a, now)]
    if known.engine is not None:
        for adapter in waiting:
            if model_of(adapter) in known.loaded:
                return Measure(adapter)
        for adapter in waiting:
            fetched = known.fetched.get(adapter.digest)
            room = len(known.loaded) < known.max_loaded
            if fetched is not None and fetched.rank <= known.max_lora_rank and room:
                return Load(adapter)
    for adapter in waiting:
        if adapter.digest not in known.fetched and not known.fetching:
            return Fetch(adapter)
    if known.engine is not None:
        for model in sorted(known.loaded):
            if retirable(known, known.engine, model, now):
                return Unload(model)
    return None


def retirable(known: Known, engine: EngineState, model: str, now: float) -> bool:
    """Neither wanted nor routed to for a while, and no request of it is still being answered."""
    assert known.desired is not None
    wanted = {model_of(adapter) for adapter in known.desired.adapters if not blocked(known, adapter, now)}
    since = known.unrouted.get(model)
    return (
        model not in wanted
        and since is not None
        and now - since >= RETIRE_SECONDS
        and not engine.in_flight.get(model, 0)
    )


def routes(known: Known) -> dict[str, tuple[Route, ...]]:
    """Who answers for each desired name: verified adapters only, the old one until a new one is verified.

    A canary never answers alone, unless the adapter beside it cannot be had.
    """
    if known.desired is None:
        return known.routes
    chosen: dict[str, tuple[Route, ...]] = {}
    for name in known.desired.names():
        wanted = [a for a in known.desired.adapters if a.name == name]
        proved = [a for a in wanted if model_of(a) in known.verified]
        if any(not a.trial and model_of(a) not in {*known.verified, *known.refused} for a in wanted):
            proved = [a for a in proved if not a.trial]
        sharing = tuple(Route(model_of(a), a.weight, a.trial) for a in proved if a.weight > 0)
        standby = tuple(Route(model_of(a), 1, a.trial) for a in proved[:1])
        before = tuple(route for route in known.routes.get(name, ()) if route.model in known.verified)
        if found := sharing or standby or before:
            chosen[name] = found
    return chosen


def saw_engine(known: Known, state: EngineState, loaded: set[str], told: Aliases) -> None:
    """Another boot id is another process: what was loaded and proved in the old one counts no more.

    `told` is the mapping file as it lies on disk: a restarted agent goes on with what it had proved in this process.
    """
    known.engine, known.boot, known.loaded = state, state.boot, set(loaded)
    same = told.boot == state.boot
    known.verified = {model: delta for model, delta in told.verified.items() if same and model in loaded}
    known.routes = told.routes if same else {}
    known.unrouted = {}
    known.refused = {model: r for model, r in known.refused.items() if r.on_disk or r.trial}
    if told.boot and not same:
        _blame_canaries(known, told)


def _blame_canaries(known: Known, told: Aliases) -> None:
    """An engine that ends while a canary is loaded, probed or asked is not given that canary again."""
    trials = {route.model: route.trial for group in told.routes.values() for route in group if route.trial}
    for adapter in known.desired.adapters if known.desired else ():
        if adapter.trial and model_of(adapter) == known.trying:
            trials[known.trying] = adapter.trial
    message = "the engine's process ended while it had this canary: see the engine's log (--previous)"
    for model, trial in trials.items():
        known.refused.setdefault(model, Refusal("EngineRestarted", message, trial=trial))


def note_failures(known: Known) -> dict[str, Refusal]:
    """Ends the trial of every canary that failed to answer a request; returns the new refusals by engine name."""
    if known.desired is None or known.engine is None:
        return {}
    ended = {}
    for adapter in known.desired.adapters:
        failed, model = known.engine.failed.get(adapter.trial, 0), model_of(adapter)
        if adapter.trial and failed and model not in known.refused:
            message = f"the engine failed to answer {failed} of this canary's requests: see the engine's log"
            ended[model] = Refusal("RequestsFailed", message, trial=adapter.trial)
    for model, refusal in ended.items():
        known.refused[model] = refusal
        known.verified.pop(model, None)
    return ended


def note_unrouted(known: Known, now: float) -> None:
    """Starts the clock of every loaded adapter that no route leads to, and stops it for the others."""
    routed = {route.model for group in known.routes.values() for route in group}
    known.unrouted = {model: known.unrouted.get(model, now) for model in known.loaded if model not in routed}


def aliases(known: Known) -> Aliases:
    """What the middleware is told."""
    names = known.desired.names() if known.desired else ()
    missing = [name for name in names if name not in known.routes]
    states = {report.name: report for report in adapter_reports(known)}
    messages = [f"{name}: {states[name].message or states[name].state}" for name in missing]
    return Aliases(
        boot=known.boot,
        ready=bool(names) and not missing,
        message="; ".join(messages),
        names=names,
        routes=known.routes,
        verified=known.verified,
    )


def adapter_reports(known: Known) -> list[AdapterReport]:
    return [adapter_report(known, adapter) for adapter in known.desired.adapters] if known.desired else []


def adapter_report(known: Known, adapter: DesiredAdapter) -> AdapterReport:
    model, fetched = model_of(adapter), known.fetched.get(adapter.digest)
    refusal = known.refused.get(model)
    report = AdapterReport(
        name=adapter.name,
        digest=adapter.digest,
        trial=adapter.trial,
        state="Downloading",
        rank=fetched.rank if fetched else None,
        logprob_delta=known.verified.get(model),
    )
    if model in known.verified:
        return report.model_copy(update={"state": "Ready"})
    if refusal is not None:
        update = {"state": "Failed", "reason": refusal.reason, "message": refusal.message}
        return report.model_copy(update={**update, "trial_failed": bool(refusal.trial)})
    if fetched is None:
        return report
    if fetched.rank > known.max_lora_rank:
        message = (
            f"rank {fetched.rank} is above the {known.max_lora_rank} that this pod's engine was started with; "
            "the pods are replaced"
        )
        return report.model_copy(update={"state": "Failed", "reason": "RankTooLarge", "message": message})
    if known.engine is None:
        return report.model_copy(update={"state": "WaitingForEngine", "message": "waiting for the engine to start"})
    return report.model_copy(update={"state": "Probing" if model in known.loaded else "Loading"})


def agent_report(known: Known, message: str) -> AgentReport:
    """What the operator is told."""
    told = aliases(known)
    served: Mapping[str, list[ServedRoute]] = {
        name: [ServedRoute(model=route.model, weight=route.weight, trial=route.trial) for route in group]
        for name, group in known.routes.items()
    }
    return AgentReport(
        sequence=known.desired.sequence if known.desired else 0,
        ready=told.ready,
        message=message or told.message,
        boot=told.boot,
        max_lora_rank=known.max_lora_rank,
        adapters=adapter_reports(known),
        served=dict(served),
    )
