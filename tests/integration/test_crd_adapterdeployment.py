"""Every rule of the AdapterDeployment CRD against the real API server: one object that breaks it, one that keeps it."""

from typing import Any

import pytest

from finetune_operator.api import AdapterDeployment
from finetune_operator.api.adapterdeployment import RESERVED_ENGINE_ARGS
from finetune_operator.api.unsupported import NOT_SUPPORTED_YET

from .apiserver import Client, Object
from .crd_cases import EVERYTHING_GROUP, Case, Changes, causes, changed, rule_messages

FOLLOWED = {"name": "support-bot", "fineTuneRef": {"name": "support-bot"}}
PINNED = {"name": "pinned", "artifact": {"uri": "s3://finetune/adapters/" + "0" * 64, "digest": "sha256:" + "0" * 64}}
BASE = {"s3": {"uri": "s3://models/tiny-llama"}}
MINIMAL: Object = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "AdapterDeployment",
    "metadata": {"name": "support-bot", "namespace": "default"},
    "spec": {"adapters": [FOLLOWED]},
}
NAME_MESSAGE = (
    "metadata.name: at most 40 characters, no dots and a letter first, because its Service has the same name; "
    "choose another name"
)

CASES = [
    Case(NAME_MESSAGE, at="<nil>", bad={"metadata.name": "s" * 41}, good={"metadata.name": "s" * 40}),
    Case(NAME_MESSAGE, at="<nil>", bad={"metadata.name": "v1.support"}, good={"metadata.name": "v1-support"}),
    Case(NAME_MESSAGE, at="<nil>", bad={"metadata.name": "1support"}, good={"metadata.name": "support1"}),
    # adapters and baseModel
    Case(
        "give exactly one of fineTuneRef and artifact",
        at="spec.adapters[0]",
        bad={"adapters": [{"name": "support-bot"}]},
        good={"adapters": [PINNED], "baseModel": BASE},
    ),
    Case(
        "give exactly one of fineTuneRef and artifact",
        at="spec.adapters[0]",
        bad={"adapters": [FOLLOWED | PINNED], "baseModel": BASE},
        good={"adapters": [FOLLOWED, PINNED], "baseModel": BASE},
    ),
    Case(
        "adapters: mode Merge serves exactly one adapter; use mode Mount, or one object per adapter",
        at="spec.adapters",
        bad={"mode": "Merge", "adapters": [FOLLOWED, FOLLOWED | {"name": "other"}]},
        good={"mode": "Mount", "adapters": [FOLLOWED, FOLLOWED | {"name": "other"}]},
    ),
    Case(
        "adapters: a canary needs both adapters in one server; use mode Mount, or remove canary",
        at="spec.adapters",
        bad={"mode": "Merge", "adapters": [FOLLOWED | {"canary": {"weight": 5}}]},
        good={"mode": "Mount", "adapters": [FOLLOWED | {"canary": {"weight": 5}}]},
    ),
    Case(
        "baseModel: an artifact does not say what it was trained on; set baseModel",
        at="spec.baseModel",
        bad={"adapters": [FOLLOWED, PINNED]},
        good={"adapters": [FOLLOWED, PINNED], "baseModel": BASE},
    ),
    Case(
        "baseModel: it is taken from the FineTune of fineTuneRef; remove baseModel",
        at="spec.baseModel",
        bad={"baseModel": BASE},
        good={},
    ),
    Case(
        "give exactly one of huggingFace, s3 and persistentVolumeClaim",
        at="spec.baseModel",
        bad={"adapters": [PINNED], "baseModel": {}},
        good={"adapters": [PINNED], "baseModel": {"huggingFace": {"repo": "acme/tiny"}}},
    ),
    # engine
    *(
        Case(
            f"extraArgs: the operator sets {', '.join(RESERVED_ENGINE_ARGS)} itself; remove them",
            at="spec.engine.extraArgs",
            bad={"engine.extraArgs": ["--enforce-eager", argument]},
            good={"engine.extraArgs": ["--enforce-eager", "--gpu-memory-utilization=0.8"]},
        )
        for argument in ("--max-loras=4", "--max_lora_rank", *RESERVED_ENGINE_ARGS)
    ),
    # autoscaling
    Case(
        "minReplicas: must be at most maxReplicas",
        at="spec.autoscaling.minReplicas",
        bad={"autoscaling": {"minReplicas": 3, "maxReplicas": 2}},
        good={"autoscaling": {"minReplicas": 2, "maxReplicas": 2}},
    ),
    Case(
        "minReplicas: only KEDA scales to 0; use type KEDA, or at least 1",
        at="spec.autoscaling.minReplicas",
        bad={"autoscaling": {"minReplicas": 0, "maxReplicas": 2}},
        good={
            "autoscaling": {
                "type": "KEDA",
                "minReplicas": 0,
                "maxReplicas": 2,
                "prometheusAddress": "http://prometheus.monitoring:9090",
            }
        },
    ),
    Case(
        "prometheusAddress: KEDA needs it and HPA does not have it; set it, or use type HPA without it",
        at="spec.autoscaling.prometheusAddress",
        bad={"autoscaling": {"type": "KEDA", "maxReplicas": 2}},
        good={"autoscaling": {"type": "HPA", "maxReplicas": 2}},
    ),
    # The pod template is the FineTune's; its rules have more cases there.
    *(
        Case(
            f"{field}: finetune.dev/, kueue.x-k8s.io/ and app.kubernetes.io/managed-by are the operator's; remove them",
            at=f"spec.podTemplate.{field}",
            bad={f"podTemplate.{field}": {"finetune.dev/adapterdeployment": "x"}},
            good={f"podTemplate.{field}": {"team": "support"}},
        )
        for field in ("labels", "annotations")
    ),
    *(
        Case(
            f"{field}: a key must look like app or example.com/app",
            at=f"spec.podTemplate.{field}",
            bad={f"podTemplate.{field}": {"a/b/c": "x"}},
            good={f"podTemplate.{field}": {"a/b": "x"}},
        )
        for field in ("labels", "annotations", "nodeSelector")
    ),
    Case(
        "key: operator Equal needs a key; give one or use operator Exists",
        at="spec.podTemplate.tolerations[0].key",
        bad={"podTemplate.tolerations": [{"value": "x"}]},
        good={"podTemplate.tolerations": [{"key": "nvidia.com/gpu", "value": "x"}]},
    ),
    Case(
        "value: operator Exists compares no value; remove it or use operator Equal",
        at="spec.podTemplate.tolerations[0].value",
        bad={"podTemplate.tolerations": [{"key": "gpu", "operator": "Exists", "value": "x"}]},
        good={"podTemplate.tolerations": [{"key": "gpu", "operator": "Exists"}]},
    ),
    Case(
        "valueFrom: give value or valueFrom, not both",
        at="spec.podTemplate.env[0].valueFrom",
        bad={
            "podTemplate.env": [{"name": "A", "value": "x", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
        },
        good={"podTemplate.env": [{"name": "A", "value": "x"}]},
    ),
    Case(
        "give exactly one of secretKeyRef and configMapKeyRef",
        at="spec.podTemplate.env[0].valueFrom",
        bad={"podTemplate.env": [{"name": "A", "valueFrom": {}}]},
        good={"podTemplate.env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
    ),
    Case(
        "name: the operator sets this variable itself; remove it",
        at="spec.podTemplate.env[0].name",
        bad={"podTemplate.env": [{"name": "PYTHONPATH", "value": "/evil"}]},
        good={"podTemplate.env": [{"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"}]},
    ),
]

# As in test_crd_finetune.py.
NOT_SUPPORTED_EXAMPLES: dict[str, Changes] = {
    "baseModel.huggingFace": {"adapters": [PINNED], "baseModel": {"huggingFace": {"repo": "acme/tiny"}}},
    "autoscaling": {"autoscaling": {"maxReplicas": 2}},
}


def test_the_minimal_object_is_accepted(kube: Client) -> None:
    assert causes(kube, MINIMAL) == set()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_object_that_breaks_a_rule_is_refused_with_its_message(kube: Client, case: Case) -> None:
    refused = causes(kube, changed(MINIMAL, case.bad, EVERYTHING_GROUP))
    assert any(field == case.at and message.endswith(f": {case.message}") for field, message in refused), refused


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_object_that_keeps_a_rule_is_accepted(kube: Client, case: Case) -> None:
    assert causes(kube, changed(MINIMAL, case.good, EVERYTHING_GROUP)) == set()


def test_every_rule_of_the_crd_has_a_case() -> None:
    assert rule_messages("AdapterDeployment") == {case.message for case in CASES}


def test_two_adapters_with_one_name_are_refused(kube: Client) -> None:
    refused = causes(kube, changed(MINIMAL, {"adapters": [FOLLOWED, FOLLOWED]}))
    assert {field for field, _ in refused} == {"spec.adapters[1]"}
    assert all("Duplicate value" in message for _, message in refused)


@pytest.mark.parametrize("path", NOT_SUPPORTED_EXAMPLES)
def test_what_is_not_supported_yet_is_refused_by_name_and_the_rest_is_accepted(kube: Client, path: str) -> None:
    refused = causes(kube, changed(MINIMAL, NOT_SUPPORTED_EXAMPLES[path]))
    messages = {message.removeprefix("Forbidden: ") for _, message in refused}
    expected = {f"{path}: not supported yet"} if path in NOT_SUPPORTED_YET["AdapterDeployment"] else set()
    assert messages == expected


def test_every_field_that_is_not_supported_yet_has_an_example() -> None:
    assert set(NOT_SUPPORTED_YET["AdapterDeployment"]) <= set(NOT_SUPPORTED_EXAMPLES)


@pytest.mark.parametrize("changes", [{}, *(case.good for case in CASES)], ids=str)
def test_the_types_fill_in_the_defaults_of_the_crd(kube: Client, changes: Changes) -> None:
    obj = changed(MINIMAL, changes, EVERYTHING_GROUP)
    stored = kube.create(obj, dry_run=True)
    assert _parsed(stored).spec == _parsed(obj).spec


def _parsed(obj: dict[str, Any]) -> AdapterDeployment:
    return AdapterDeployment.model_validate({**obj, "apiVersion": MINIMAL["apiVersion"]})
