"""What the agent does next and tells others, as tables: nothing here waits, fetches or loads."""

from pathlib import Path

import pytest

from finetune_serving import plan
from finetune_serving.artifact import Fetched, Unservable, engine_rank
from finetune_serving.desired import Desired, DesiredAdapter, DesiredBase
from finetune_serving.engine import EngineState
from finetune_serving.plan import Fetch, Known, Load, Measure, Refusal, Unload, next_step
from finetune_serving.probe import Effect, beginnings, mean_difference, measure
from finetune_serving.routes import Aliases, Route

A, B, C = (DesiredAdapter(name="bot", digest="sha256:" + text * 32, uri="s3://x/a") for text in ("aa", "bb", "cc"))
MODEL_A, MODEL_B = plan.model_of(A), plan.model_of(B)


def known(*adapters: DesiredAdapter, engine: bool = True, **more: object) -> Known:
    desired = Desired(sequence=1, base_model=DesiredBase(uri="s3://x/base"), adapters=list(adapters))
    state = EngineState("boot", {}) if engine else None
    values: dict[str, object] = {"desired": desired, "engine": state, "boot": "boot", "max_lora_rank": 16, **more}
    return Known(**values)  # type: ignore[arg-type]


def on_disk(*adapters: DesiredAdapter, rank: int = 8) -> dict[str, Fetched]:
    return {adapter.digest: Fetched(Path("/models"), rank) for adapter in adapters}


@pytest.mark.parametrize(
    "seen, step",
    [
        (Known(), None),
        (known(A), Fetch(A)),
        (known(A, fetching=A.digest), None),
        (known(A, fetched=on_disk(A), engine=False), None),
        (known(A, fetched=on_disk(A)), Load(A)),
        (known(A, fetched=on_disk(A, rank=32)), None),
        (known(A, fetched=on_disk(A), loaded={MODEL_A}), Measure(A)),
        (known(A, B, fetched=on_disk(A), loaded={MODEL_A}, verified={MODEL_A: 1.0}), Fetch(B)),
        (known(A, B, fetched=on_disk(A, B), loaded={MODEL_A}, verified={MODEL_A: 1.0}), Load(B)),
        (known(B, fetched=on_disk(B), loaded={MODEL_A, "x@1"}, verified={MODEL_A: 1.0}, max_loaded=2), None),
        (known(A, refused={MODEL_A: Refusal("NoEffect", "")}, fetched=on_disk(A)), None),
        (known(A, refused={MODEL_A: Refusal("DownloadFailed", "", again=50.0)}), None),
        (known(A, refused={MODEL_A: Refusal("DownloadFailed", "", again=5.0)}), Fetch(A)),
    ],
)
def test_the_next_step(seen: Known, step: plan.Step | None) -> None:
    assert next_step(seen, now=10.0) == step


def test_an_adapter_is_unloaded_when_no_route_leads_to_it_and_nothing_is_in_flight() -> None:
    seen = known(B, fetched=on_disk(B), loaded={MODEL_A, MODEL_B}, verified={MODEL_A: 1.0, MODEL_B: 1.0})
    seen.routes = {"bot": (Route(MODEL_A, 100),)}
    seen.routes = plan.routes(seen)
    plan.note_unrouted(seen, now=100.0)
    assert next_step(seen, now=100.0 + plan.RETIRE_SECONDS - 1) is None
    seen.engine = EngineState("boot", {MODEL_A: 1})
    assert next_step(seen, now=200.0) is None
    seen.engine = EngineState("boot", {})
    assert next_step(seen, now=200.0) == Unload(MODEL_A)


def test_a_route_that_comes_back_stops_the_clock() -> None:
    seen = known(A, loaded={MODEL_A}, verified={MODEL_A: 1.0}, unrouted={MODEL_A: 1.0})
    seen.routes = plan.routes(seen)
    plan.note_unrouted(seen, now=2.0)
    assert seen.unrouted == {}


@pytest.mark.parametrize(
    "verified, before, expected",
    [
        ([], [], None),
        (["a"], [], [(MODEL_A, 100)]),
        (["a", "b"], ["a"], [(MODEL_A, 100)]),
        (["b"], ["b"], [(MODEL_B, 1)]),  # weight 0 answers while nothing else can
    ],
)
def test_a_name_is_answered_by_what_is_verified(verified: list[str], before: list[str], expected: object) -> None:
    models = {"a": MODEL_A, "b": MODEL_B}
    seen = known(A, B.model_copy(update={"weight": 0}))
    seen.verified = {models[letter]: 1.0 for letter in verified}
    seen.routes = {"bot": tuple(Route(models[letter], 100) for letter in before)}
    found = plan.routes(seen).get("bot")
    assert (None if found is None else [(route.model, route.weight) for route in found]) == expected


def test_an_old_adapter_that_left_the_set_answers_until_a_new_one_can() -> None:
    seen = known(B, verified={MODEL_A: 1.0})
    seen.routes = {"bot": (Route(MODEL_A, 100),)}
    assert plan.routes(seen) == {"bot": (Route(MODEL_A, 100),)}
    seen.verified[MODEL_B] = 1.0
    assert plan.routes(seen) == {"bot": (Route(MODEL_B, 100),)}


def test_another_boot_forgets_what_was_proved_and_the_same_boot_takes_it_over() -> None:
    told = Aliases("boot", True, "", ("bot",), {"bot": (Route(MODEL_A, 100),)}, {MODEL_A: 0.5})
    same, other = known(A), known(A, refused={MODEL_A: Refusal("LoadFailed", "")})
    plan.saw_engine(same, EngineState("boot", {}), {MODEL_A}, told)
    assert same.verified == {MODEL_A: 0.5} and same.routes == told.routes
    plan.saw_engine(other, EngineState("another", {}), set(), told)
    assert other.verified == {} and other.routes == {} and other.refused == {}


CANARY = B.model_copy(update={"weight": 50, "trial": "trial-1"})


def sharing(**more: object) -> Known:
    """A answers, and B beside it as a canary."""
    seen = known(A, CANARY, loaded={MODEL_A, MODEL_B}, verified={MODEL_A: 1.0, MODEL_B: 1.0}, **more)
    seen.routes = plan.routes(seen)
    assert seen.routes == {"bot": (Route(MODEL_A, 100), Route(MODEL_B, 50, "trial-1"))}
    return seen


def tried(seen: Known) -> tuple[str, str, bool]:
    report = plan.adapter_reports(seen)[1]
    return report.state, report.reason, report.trial_failed


def test_a_canary_that_fails_a_request_answers_no_more_and_is_unloaded() -> None:
    seen = sharing()
    seen.engine = EngineState("boot", {}, {"another-trial": 7})
    assert plan.note_failures(seen) == {} and tried(seen) == ("Ready", "", False)
    seen.engine = EngineState("boot", {}, {"trial-1": 1})
    assert list(plan.note_failures(seen)) == [MODEL_B] and plan.note_failures(seen) == {}
    seen.routes = plan.routes(seen)
    assert seen.routes == {"bot": (Route(MODEL_A, 100),)}
    assert tried(seen) == ("Failed", "RequestsFailed", True)
    plan.note_unrouted(seen, now=0.0)
    assert next_step(seen, now=plan.RETIRE_SECONDS) == Unload(MODEL_B)


def test_a_failed_trial_survives_another_set_and_ends_with_another_trial() -> None:
    seen = sharing()
    seen.refused = {MODEL_B: Refusal("LoadFailed", "", trial="trial-1"), MODEL_A: Refusal("DownloadFailed", "", 1.0)}
    assert seen.desired is not None
    plan.take(seen, seen.desired.model_copy(update={"sequence": 2}))
    assert set(seen.refused) == {MODEL_B}
    again = CANARY.model_copy(update={"trial": "trial-2"})
    plan.take(seen, seen.desired.model_copy(update={"sequence": 3, "adapters": [A, again]}))
    assert seen.refused == {}


@pytest.mark.parametrize("trying, routed, blamed", [("", True, True), (MODEL_B, False, True), ("", False, False)])
def test_an_engine_that_ends_with_a_canary_in_it_is_not_given_it_again(trying: str, routed: bool, blamed: bool) -> None:
    seen = sharing(trying=trying)
    told = Aliases("boot", routes=seen.routes if routed else {"bot": (Route(MODEL_A, 100),)})
    plan.saw_engine(seen, EngineState("another", {}), set(), told)
    assert (tried(seen)[1:] == ("EngineRestarted", True)) == blamed


def test_a_canary_never_answers_alone_while_the_adapter_beside_it_can_be_had() -> None:
    seen = known(A, CANARY, verified={MODEL_B: 1.0})
    assert plan.routes(seen) == {}
    seen.refused = {MODEL_A: Refusal("DownloadFailed", "", 9.0)}
    assert plan.routes(seen) == {"bot": (Route(MODEL_B, 50, "trial-1"),)}


def test_the_mapping_is_ready_when_every_name_has_a_route() -> None:
    other = DesiredAdapter(name="other", digest=C.digest, uri=C.uri)
    seen = known(A, other, verified={MODEL_A: 1.0})
    seen.routes = plan.routes(seen)
    told = plan.aliases(seen)
    assert not told.ready and told.message == "other: Downloading" and told.names == ("bot", "other")
    seen.verified[plan.model_of(other)] = 1.0
    seen.routes = plan.routes(seen)
    assert plan.aliases(seen).ready and Aliases.loads(plan.aliases(seen).dumps()) == plan.aliases(seen)


@pytest.mark.parametrize("rank, engine", [(1, 1), (2, 8), (8, 8), (20, 32), (200, 256), (400, 512)])
def test_the_engines_rank_is_the_next_that_vllm_takes(rank: int, engine: int) -> None:
    assert engine_rank(rank) == engine


def test_a_rank_that_vllm_does_not_have_is_refused() -> None:
    with pytest.raises(Unservable, match="rank 513 is above vLLM's largest, 512; serve it with mode: Merge"):
        engine_rank(513)


@pytest.mark.parametrize(
    "effect, min_delta, words",
    [
        (Effect(0.0, 0.0), 0.001, "exactly like the base model"),
        (Effect(0.0005, 0.0), 0.001, "less than spec.probe.minLogprobDelta"),
        (Effect(0.02, 0.01), 0.001, "engine's own noise"),
        (Effect(0.02, 0.001), 0.001, ""),
        (Effect(0.0, 0.0), 0.0, ""),
    ],
)
def test_what_proves_an_effect(effect: Effect, min_delta: float, words: str) -> None:
    refusal = effect.refusal(min_delta)
    assert (refusal is not None and words in refusal[1]) if words else refusal is None


class Wavering:
    """An engine whose base model answers `noisy` prompts otherwise each time; the adapter always differs by 1."""

    def __init__(self, noisy: set[str]) -> None:
        self.noisy, self.asked = noisy, 0

    async def next_logprobs(self, model: str, prompts: list[str]) -> list[dict[str, float]]:
        self.asked += 1
        wavers = self.asked * 10.0 if prompts[-1] in self.noisy and model == "base" else 0.0
        return [{"a": -(wavers + (model != "base"))} for _ in prompts]


@pytest.mark.parametrize("noisy, clear", [(set(), True), ({"one"}, True), ({"one", "two"}, False)])
async def test_a_prompt_that_wavers_proves_nothing_and_hides_nothing(noisy: set[str], clear: bool) -> None:
    effect = await measure(Wavering(noisy), MODEL_A, ["one", "two"])  # type: ignore[arg-type]
    assert effect.clear == clear
    assert (effect.refusal(0.001) is None) == clear
    assert effect.delta == 1.0 or not clear


def test_a_prompt_is_compared_at_several_places() -> None:
    assert beginnings("one") == ["one"]
    texts = beginnings(" ".join(str(number) for number in range(60)))
    assert len(texts) == 6 and texts[-1].endswith("59") and all(texts[-1].startswith(text) for text in texts)


def test_a_token_that_is_no_longer_likely_counts_as_the_least_likely_known() -> None:
    assert mean_difference([{"a": -1.0, "b": -2.0}], [{"a": -1.5, "c": -4.0}]) == pytest.approx((0.5 + 2.0) / 2)
    assert mean_difference([], []) == 0.0
