"""Methods beside QLoRA: trained at once, said how they can be served, and refused where they cannot be trained."""

from __future__ import annotations

import pytest

from e2e.cases.conftest import Apply
from e2e.cases.objects import adapter_deployment, finetune
from e2e.kubectl import Kubectl, KubectlFailed, Object, condition

INT8: Object = {
    "type": "LoRA",
    "quantization": {"type": "INT8"},
    "lora": {"rank": 4, "alpha": 8, "rankPattern": {"q_proj": 12}, "loraPlusRatio": 4, "useRslora": True},
}
ADALORA: Object = {"type": "AdaLoRA", "adaLora": {"initialRank": 6, "targetRank": 3}}
IA3_IN_4_BITS: Object = {"type": "IA3", "quantization": {"type": "NF4"}}
NOT_OF_THIS_MODEL: Object = {"type": "LoRA", "lora": {"targetModules": ["c_attn"]}}


def test_methods_are_trained_beside_each_other_and_said_how_they_can_be_served(
    namespace: str, apply: Apply, seed: int
) -> None:
    int8, adalora, ia3, wrong = (
        apply(finetune(name, namespace, seed, method=method))
        for name, method in (
            ("int8", INT8),
            ("adalora", ADALORA),
            ("ia3", IA3_IN_4_BITS),
            ("wrong", NOT_OF_THIS_MODEL),
        )
    )
    mounted = apply(adapter_deployment("mounted", namespace, follows="ia3"))

    failed = wrong.wait_failed()
    assert failed["reason"] == "UnsupportedCombination"
    assert "method.lora.targetModules: c_attn names no layer of this llama model" in failed["message"]
    assert wrong.stages() == ["prepare"]

    made = {tune.name: tune.wait_true("Complete")["status"]["adapter"] for tune in (int8, adalora, ia3)}
    assert made["int8"]["rank"] == 12, "the largest of the pattern"
    assert 1 <= made["adalora"]["rank"] <= 6, "plain LoRA of what the budget left"
    assert {name: adapter["method"] for name, adapter in made.items()} == {
        "int8": "LoRA",
        "adalora": "AdaLoRA",
        "ia3": "IA3",
    }
    assert [name for name, adapter in made.items() if adapter.get("mountRefusal")] == ["ia3"]
    assert not [name for name, adapter in made.items() if adapter.get("mergeRefusal")]

    # No engine is started for what it could not mount.
    blocked = mounted.wait_phase("Blocked", timeout=30)
    ready = condition(blocked, "Ready")
    assert ready is not None
    assert (ready["status"], ready["reason"]) == ("False", "UnsupportedAdapter")
    assert "serve it with mode: Merge" in ready["message"]
    assert mounted.owned("pods") == mounted.owned("deployments") == []


def test_a_combination_that_cannot_be_trained_is_refused_by_the_api_server(
    namespace: str, kubectl: Kubectl, seed: int
) -> None:
    method = {"type": "QLoRA", "lora": {"initialization": "PiSSA"}}
    with pytest.raises(KubectlFailed, match="lora.initialization: PiSSA and OLoRA change the base weights"):
        kubectl.apply(finetune("pissa-in-4-bits", namespace, seed, method=method))
