"""Objectives that compare answers, from rows in a ConfigMap to a judged adapter: two runs side by side."""

from __future__ import annotations

from typing import Any

from e2e.cases.conftest import Apply
from e2e.cases.objects import adapter_deployment, config_map, finetune, from_config_map, jsonl, training

FACTS = {
    "What colour is the light without a link?": ("Amber.", "I do not know."),
    "How many litres does the kettle hold?": ("Two.", "Many."),
    "How long is the reset key held?": ("Twelve seconds.", "A while."),
    "Where is the spare key?": ("In the office.", "Somewhere."),
    "Who changes the filter?": ("The night shift.", "Somebody."),
    "When does the desk open?": ("At eight.", "Early."),
}


def pairs() -> list[dict[str, Any]]:
    return [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, (good, bad) in FACTS.items()]


def compared(
    name: str, namespace: str, seed: int, objective: str, gates: list[dict[str, Any]], **spec: Any
) -> dict[str, Any]:
    """A run of few steps on the pairs, evaluated on the same ones."""
    rows = from_config_map("pairs")
    return finetune(
        name,
        namespace,
        seed,
        dataset={"train": rows, "evaluation": rows},
        objective={"type": objective},
        training=training(seed, steps=8, learningRate=0.003, batchSize=6),
        evaluation={"gates": gates},
        **spec,
    )


def test_dpo_and_a_reward_model_learn_to_prefer_and_only_one_is_served(namespace: str, apply: Apply, seed: int) -> None:
    apply(config_map("pairs", namespace, {"train.jsonl": jsonl(pairs())}))
    gates = [{"metric": "loss", "betterThanBase": True}, {"metric": "reward_accuracy", "min": 0.6}]
    preferring = apply(compared("preferring", namespace, seed, "DPO", gates))
    scoring = apply(compared("scoring", namespace, seed, "Reward", [], output={"exports": ["Merged"]}))
    served = apply(adapter_deployment("scores", namespace, follows="scoring"))

    status = preferring.wait_true("Complete")["status"]
    assert status["dataset"]["format"] == "Preference"
    found = status["evaluation"]
    assert found["base"] == {"loss": 0.693147, "reward_accuracy": 0.5, "reward_margin": 0.0}
    assert found["adapter"]["loss"] < 0.69 and found["adapter"]["reward_margin"] > 0
    assert [gate["passed"] for gate in found["gates"]] == [True, True]
    assert status["adapter"].get("mountRefusal", "") == ""

    status = scoring.wait_true("Complete")["status"]
    assert set(status["evaluation"]["adapter"]) == {"loss", "reward_accuracy", "reward_margin"}
    assert status["evaluation"].get("base", {}) == {}
    (export,) = status["exports"]
    assert "its scores differ from the mounted adapter's by" in export["message"]
    refused = served.wait(
        "refused",
        lambda found: found if found.get("status", {}).get("reason") == "UnsupportedAdapter" else None,
    )["status"]
    assert refused["phase"] == "Blocked"
    assert "scores answers" in refused["message"]
    assert served.owned("pods") == []
