"""Every decision about an AdapterDeployment, on plans alone."""

from typing import Any

import pytest

from finetune_operator.kube import CONFIGMAPS, DEPLOYMENTS
from finetune_operator.serving import workloads
from finetune_operator.settings import Settings

from .objects import (
    BASE,
    NEW,
    OLD,
    OTHER_BASE,
    READY,
    SETTINGS,
    World,
    deployment,
    finetune,
    follows,
    made,
    serving,
    uri,
)


def condition(decided: Any, kind: str) -> tuple[str, str]:
    found = next(c for c in decided.status.conditions if c.type == kind)
    return found.status, found.reason


# ---- nothing to serve yet --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "finetunes, phase, reason, words",
    [
        ((), "Blocked", "FineTuneNotFound", "there is no FineTune 'bot'"),
        ((finetune(phase="Training", message="step 3 of 9"),), "Pending", "NoAdapterYet", "Training: step 3 of 9"),
        ((finetune(adapter=made(OLD, passed=False)),), "Blocked", "GateNotPassed", "set spec.gate: Ignore"),
        ((finetune(adapter=made(OLD, passed=None)),), "Blocked", "GateNotPassed", "passed its gates"),
    ],
)
def test_without_an_adapter_nothing_is_created_and_the_reason_is_said(
    finetunes: Any, phase: str, reason: str, words: str
) -> None:
    world = World(deployment(), *finetunes)
    decided = world.look()
    assert (decided.status.phase, decided.status.reason) == (phase, reason)
    assert words in decided.status.message and world.children == {}
    assert condition(decided, "Ready") == ("False", reason)
    assert condition(decided, "GatePassed")[0] == ("False" if reason == "GateNotPassed" else "Unknown")


def test_the_gates_that_failed_are_named() -> None:
    gates = {"gates": [{"metric": "loss", "passed": False, "message": "loss 2.1 <= 1.2"}]}
    decided = World(deployment(), finetune(adapter=made(OLD, passed=False), evaluation=gates)).look()
    assert "loss 2.1 <= 1.2" in decided.status.message


def test_gate_ignore_serves_an_adapter_that_did_not_pass() -> None:
    world = World(deployment(gate="Ignore"), finetune(adapter=made(OLD, passed=False)))
    decided = world.look()
    assert world.desired() == [("support-bot", OLD, 100)]
    assert condition(decided, "GatePassed") == ("Unknown", "GateIgnored")


def test_an_older_adapter_that_passed_is_served_while_the_newest_did_not() -> None:
    world = World(deployment(), finetune(adapter=made(NEW, passed=False), history=(made(NEW, False), made(OLD))))
    world.look()
    assert world.desired() == [("support-bot", OLD, 100)]


DORA = {"method": "LoRA", "mountRefusal": "vLLM cannot mount use_dora; serve it with mode: Merge"}
PROMPT = {
    "method": "PromptTuning",
    "mountRefusal": "vLLM cannot serve peft_type PROMPT_TUNING; train with method.type LoRA or QLoRA",
    "mergeRefusal": "PROMPT_TUNING adds tokens and changes no weights, so nothing can be merged; use method.type LoRA",
}


@pytest.mark.parametrize(
    "method, mode, words",
    [
        (DORA, "Mount", "support-bot: vLLM cannot mount use_dora; serve it with mode: Merge"),
        (PROMPT, "Mount", "support-bot: vLLM cannot serve peft_type PROMPT_TUNING"),
        (PROMPT, "Merge", "support-bot: PROMPT_TUNING adds tokens and changes no weights"),
    ],
)
def test_no_pod_is_started_for_an_adapter_that_cannot_be_served_so(method: Any, mode: str, words: str) -> None:
    world = World(deployment(mode=mode), finetune(adapter=made(OLD, **method)))
    decided = world.look()
    assert (decided.status.phase, decided.status.reason) == ("Blocked", "UnsupportedAdapter")
    assert decided.status.message.startswith(words) and world.children == {}
    assert condition(decided, "Ready") == ("False", "UnsupportedAdapter")
    assert condition(decided, "AdaptersVerified") == ("False", "UnsupportedAdapter")
    assert condition(decided, "GatePassed")[0] == "Unknown"


def test_what_cannot_be_mounted_is_merged() -> None:
    world = World(deployment(mode="Merge"), finetune(adapter=made(OLD, **DORA)))
    assert world.look().status.phase == "Progressing"
    assert "Deployment" in world.children


def test_a_new_adapter_that_cannot_be_mounted_leaves_the_old_one_in_service() -> None:
    world = serving(OLD)
    template = world.children["Deployment"]["spec"]["template"]
    world.finetunes["bot"] = finetune(adapter=made(NEW, **DORA), history=(made(NEW, **DORA), made(OLD)))
    decided = world.look()
    assert (decided.status.phase, decided.status.reason) == ("Ready", "UnsupportedAdapter")
    assert "its last good adapter goes on answering" in decided.status.message
    assert world.desired() == [("support-bot", OLD, 100)]
    assert world.children["Deployment"]["spec"]["template"] == template


def test_an_artifact_is_served_on_the_base_model_of_the_spec() -> None:
    artifact = {"name": "support-bot", "artifact": {"uri": uri(OLD), "digest": OLD}}
    world = World(deployment(artifact, baseModel={"s3": {"uri": "s3://models/tiny-llama"}}))
    assert world.look().status.phase == "Progressing"
    assert world.desired() == [("support-bot", OLD, 100)]
    without = World(deployment(artifact)).look()
    assert (without.status.phase, without.status.reason) == ("Blocked", "NoBaseModel")


def test_the_base_models_own_name_is_refused() -> None:
    decided = World(deployment(follows("base")), finetune(adapter=made(OLD))).look()
    assert decided.status.reason == "ReservedName" and decided.apply == ()


def test_engine_arguments_that_the_operator_sets_are_refused() -> None:
    world = World(deployment(engine={"extraArgs": ["--api-key=x", "--max_loras", "9"]}), finetune(adapter=made(OLD)))
    decided = world.look()
    assert (decided.status.phase, decided.status.reason) == ("Failed", "InvalidEngineArguments")
    assert "--api-key, --max-loras" in decided.status.message and "VLLM_API_KEY" in decided.status.message
    assert world.children == {}


def test_children_that_belong_to_somebody_else_are_never_touched() -> None:
    world = World(deployment(), finetune(adapter=made(OLD)))
    world.children["Deployment"] = {"metadata": {"name": "support-bot"}, "spec": {}}
    decided = world.look()
    assert (decided.status.phase, decided.status.reason) == ("Failed", "NameTaken")
    assert decided.apply == () and "Deployment support-bot exists and is not ours" in decided.status.message


# ---- becoming ready --------------------------------------------------------------------------------------------------


def test_the_first_look_creates_everything_with_the_config_map_first() -> None:
    decided = World(deployment(), finetune(adapter=made(OLD))).look()
    assert [resource.kind for resource, _ in decided.apply] == ["ConfigMap", "Service", "Deployment"]
    assert decided.status.phase == "Progressing" and decided.status.url == "http://support-bot.demo.svc"
    assert "finetune.dev/adapterdeployment=support-bot" in decided.status.selector
    owner = decided.apply[0][1]["metadata"]["ownerReferences"][0]
    assert owner["uid"] == "uid-ad" and owner["controller"] is True


def test_ready_needs_the_pod_and_the_verified_digest() -> None:
    world = World(deployment(), finetune(adapter=made(OLD)))
    world.settle()
    world.run_pods(ready=False)
    world.report(ready=False, a={"state": "Probing"})
    assert world.settle().status.phase == "Progressing"
    world.run_pods()
    world.report(served={"support-bot": OLD}, a=READY)
    decided = world.settle()
    assert decided.status.phase == "Ready" and condition(decided, "Ready") == ("True", "Serving")
    assert condition(decided, "AdaptersVerified") == ("True", "Verified")
    adapter = decided.status.adapters[0]
    assert (adapter.served_digest, adapter.ready_pods) == (OLD, 1)
    assert adapter.probe is not None and adapter.probe.logprob_delta == 0.5
    assert [(h.digest, h.reason) for h in decided.status.history] == [(OLD, "First")]
    assert decided.status.summary is not None and decided.status.summary.adapter == "a" * 12


def test_a_look_at_a_settled_world_changes_nothing() -> None:
    world = serving()
    before = world.parent.status
    decided = world.look()
    assert decided.apply == () and decided.events == () and decided.status == before


def test_events_tell_once_what_is_served() -> None:
    world = World(deployment(), finetune(adapter=made(OLD)))
    world.settle()
    world.run_pods()
    world.report(served={"support-bot": OLD}, a=READY)
    assert [event.reason for event in world.look().events] == ["AdapterServed", "Ready"]
    assert world.look().events == ()


def test_an_operator_that_was_restarted_does_not_forget_what_is_served() -> None:
    world = serving()
    world.reports.clear()
    decided = world.look()
    assert decided.status.phase == "Ready" and decided.status.adapters[0].served_digest == OLD
    assert decided.status.adapters[0].ready_pods == 1 and decided.events == ()


def test_reports_of_pods_that_were_replaced_count_no_more() -> None:
    world = serving()
    world.pods[0]["metadata"]["uid"] = "another"
    world.pods[0]["status"]["conditions"] = []
    world.children["Deployment"]["status"]["readyReplicas"] = 0
    assert world.look().status.phase == "Progressing"


# ---- a new adapter ---------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_the_config_map_and_not_the_pods() -> None:
    world = serving()
    template, sequence = world.template(), world.look().desired
    world.finetunes["bot"] = finetune(adapter=made(NEW), history=(made(NEW), made(OLD)))
    decided = world.look()
    assert [resource for resource, _ in decided.apply] == [CONFIGMAPS]
    assert world.template() == template
    assert world.desired() == [("support-bot", NEW, 100), ("support-bot", OLD, 0)]
    assert decided.desired is not None and sequence is not None and decided.desired.sequence > sequence.sequence


def test_the_old_digest_is_served_until_the_new_one_answers_everywhere() -> None:
    world = serving(replicas=2)
    world.run_pods(2)
    for number in range(2):
        world.report(number, served={"support-bot": OLD}, a=READY)
    world.settle()
    world.finetunes["bot"] = finetune(adapter=made(NEW))
    world.settle()
    world.report(0, served={"support-bot": NEW}, a=READY, b=READY)
    decided = world.settle()
    assert (decided.status.phase, decided.status.reason) == ("Progressing", "Swapping")
    assert (decided.status.adapters[0].served_digest, decided.status.adapters[0].ready_pods) == (OLD, 1)
    world.report(1, served={"support-bot": NEW}, a=READY, b=READY)
    decided = world.settle()
    assert decided.status.phase == "Ready" and decided.status.adapters[0].served_digest == NEW
    assert world.desired() == [("support-bot", NEW, 100)]
    assert [h.digest for h in decided.status.history] == [NEW, OLD]


def test_a_new_adapter_without_effect_leaves_the_old_one_and_is_degraded() -> None:
    world = serving()
    world.finetunes["bot"] = finetune(adapter=made(NEW))
    world.settle()
    world.report(
        served={"support-bot": OLD}, a=READY, b={"state": "Failed", "reason": "NoEffect", "message": "the same"}
    )
    decided = world.settle()
    assert (decided.status.phase, decided.status.reason) == ("Degraded", "NoEffect")
    assert f"{OLD} goes on answering" in decided.status.message
    assert condition(decided, "AdaptersVerified") == ("False", "NoEffect")
    assert decided.status.adapters[0].served_digest == OLD


def test_a_first_adapter_without_effect_is_failed_and_never_ready() -> None:
    world = World(deployment(), finetune(adapter=made(OLD)))
    world.settle()
    world.run_pods(ready=False)
    world.report(ready=False, a={"state": "Failed", "reason": "DigestMismatch", "message": "m.safetensors was changed"})
    decided = world.settle()
    assert (decided.status.phase, decided.status.reason) == ("Failed", "DigestMismatch")
    assert condition(decided, "Ready") == ("False", "DigestMismatch")


def test_a_rollback_is_said_so() -> None:
    world = serving()
    for digest, letter in ((NEW, "b"), (OLD, "a")):
        world.finetunes["bot"] = finetune(adapter=made(digest))
        world.settle()
        world.report(served={"support-bot": digest}, **{letter: READY})
        world.settle()
    assert [(h.digest, h.reason) for h in world.parent.status.history] == [
        (OLD, "Rollback"),
        (NEW, "NewAdapter"),
        (OLD, "First"),
    ]


def test_a_deleted_finetune_takes_nothing_out_of_service() -> None:
    world = serving()
    world.finetunes.clear()
    decided = world.settle()
    assert decided.status.phase == "Ready" and decided.status.reason == "FineTuneNotFound"
    assert decided.apply == () and world.desired() == [("support-bot", OLD, 100)]


def test_a_larger_rank_replaces_the_pods_and_a_smaller_one_does_not() -> None:
    def rank(world: World) -> str:
        agent = world.template()["spec"]["initContainers"][0]
        found: str = next(v["value"] for v in agent["env"] if v["name"] == "FINETUNE_MIN_LORA_RANK")
        return found

    world = serving()
    world.finetunes["bot"] = finetune(adapter=made(NEW, rank=64))
    assert DEPLOYMENTS in [resource for resource, _ in world.look().apply]
    assert rank(world) == "64"
    world.finetunes["bot"] = finetune(adapter=made(OLD, rank=8))
    world.look()
    assert rank(world) == "64"


def test_a_rank_that_only_the_agent_could_know_replaces_the_pods_too() -> None:
    artifact = {"name": "support-bot", "artifact": {"uri": uri(OLD), "digest": OLD}}
    world = World(deployment(artifact, baseModel={"s3": {"uri": "s3://models/tiny-llama"}}))
    world.settle()
    world.run_pods(ready=False)
    world.report(ready=False, a={"state": "Failed", "reason": "RankTooLarge", "message": "m", "rank": 32})
    decided = world.look()
    assert DEPLOYMENTS in [resource for resource, _ in decided.apply] and decided.status.phase == "Progressing"


def test_another_base_model_replaces_the_pods_and_takes_no_old_adapter_along() -> None:
    world = serving()
    world.finetunes["bot"] = finetune(adapter=made(NEW, base=OTHER_BASE))
    decided = world.look()
    assert {resource.kind for resource, _ in decided.apply} == {"ConfigMap", "Deployment"}
    assert world.desired() == [("support-bot", NEW, 100)]
    assert decided.status.adapters[0].served_digest == OLD and decided.status.phase == "Progressing"
    assert world.settle().apply == () and world.desired() == [("support-bot", NEW, 100)]
    world.run_pods()
    world.report(served={"support-bot": NEW}, b=READY)
    decided = world.settle()
    assert decided.status.phase == "Ready"
    assert decided.status.base_model is not None and decided.status.base_model.digest == OTHER_BASE


# ---- several names ---------------------------------------------------------------------------------------------------


def test_adapters_of_another_base_model_are_refused() -> None:
    world = World(
        deployment(follows(), follows("other", "second")),
        finetune(adapter=made(OLD)),
        finetune("second", adapter=made(NEW, base=OTHER_BASE)),
    )
    world.settle()
    assert world.desired() == [("support-bot", OLD, 100)]
    world.run_pods()
    world.report(served={"support-bot": OLD}, a=READY)
    decided = world.settle()
    assert (decided.status.phase, decided.status.reason) == ("Degraded", "BaseModelMismatch")
    assert BASE in decided.status.message and OTHER_BASE in decided.status.message


def test_names_that_have_an_adapter_are_served_while_others_wait() -> None:
    world = World(deployment(follows(), follows("other", "second")), finetune(adapter=made(OLD)), finetune("second"))
    world.settle()
    world.run_pods()
    world.report(served={"support-bot": OLD}, a=READY)
    assert (world.settle().status.phase, world.parent.status.reason) == ("Degraded", "NoAdapterYet")


# ---- pods that do not start ------------------------------------------------------------------------------------------


def waiting(container: str, reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return {"name": container, "state": {"waiting": {"reason": reason, "message": message}}, **more}


@pytest.mark.parametrize(
    "status, phase, reason, words",
    [
        (
            {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}]},
            "Progressing",
            "Unschedulable",
            "0/1 nodes",
        ),
        (
            {"phase": "Pending", "containerStatuses": [waiting("engine", "ImagePullBackOff", "vllm:1 not found")]},
            "Failed",
            "ImagePullFailed",
            "vllm:1 not found",
        ),
        (
            {"phase": "Pending", "initContainerStatuses": [waiting("agent", "CreateContainerConfigError", "secret x")]},
            "Failed",
            "MissingReference",
            "secret x",
        ),
        (
            {
                "containerStatuses": [
                    waiting(
                        "engine",
                        "CrashLoopBackOff",
                        lastState={"terminated": {"exitCode": 1, "message": "ValueError: no kernel image"}},
                    )
                ]
            },
            "Failed",
            "CrashLoop",
            "no kernel image",
        ),
        (
            {
                "containerStatuses": [
                    waiting("engine", "CrashLoopBackOff", lastState={"terminated": {"reason": "OOMKilled"}})
                ]
            },
            "Failed",
            "OutOfMemory",
            "raise resources.memory",
        ),
    ],
)
def test_why_a_pod_does_not_start_is_said(status: dict[str, Any], phase: str, reason: str, words: str) -> None:
    world = World(deployment(), finetune(adapter=made(OLD)))
    world.settle()
    world.run_pods(ready=False, **{"conditions": [], **status})
    decided = world.settle()
    assert (decided.status.phase, decided.status.reason) == (phase, reason)
    assert words in decided.status.message


def test_what_only_events_say_of_a_pod_is_said_too() -> None:
    world = World(deployment(), finetune(adapter=made(OLD)))
    world.settle()
    world.run_pods(ready=False, phase="Pending", conditions=[])
    world.explanations = {world.pods[0]["metadata"]["uid"]: ("MountFailed", 'configmap "finetune-ca" not found')}
    decided = world.settle()
    assert (decided.status.phase, decided.status.reason) == ("Progressing", "MountFailed")
    assert "finetune-ca" in decided.status.message


def test_pods_that_may_not_be_created_are_failed_with_the_api_servers_words() -> None:
    world = World(deployment(), finetune(adapter=made(OLD)))
    world.settle()
    failure = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: gpus"}
    world.children["Deployment"]["status"] = {"conditions": [failure]}
    decided = world.settle()
    assert (decided.status.phase, decided.status.reason) == ("Failed", "PodNotCreated")
    assert decided.status.message == "exceeded quota: gpus"


def test_one_broken_pod_of_two_is_degraded() -> None:
    world = serving(replicas=2)
    world.run_pods(2)
    world.report(0, served={"support-bot": OLD}, a=READY)
    world.pods[1]["status"] = {"phase": "Pending", "containerStatuses": [waiting("engine", "ErrImagePull")]}
    world.children["Deployment"]["status"]["readyReplicas"] = 1
    decided = world.settle()
    assert (decided.status.phase, decided.status.reason) == ("Degraded", "ImagePullFailed")


def test_zero_replicas_is_what_was_asked_for() -> None:
    world = World(deployment(replicas=0), finetune(adapter=made(OLD)))
    assert (world.settle().status.phase, world.parent.status.reason) == ("Ready", "ScaledToZero")


# ---- merge -----------------------------------------------------------------------------------------------------------


def test_merge_rolls_out_a_new_digest_and_needs_no_agent() -> None:
    world = World(deployment(mode="Merge"), finetune(adapter=made(OLD)))
    world.settle()
    assert set(world.children) == {"Deployment", "Service"}
    first = world.template()
    assert first["metadata"]["annotations"][workloads.DIGEST] == OLD
    assert [c["name"] for c in first["spec"]["initContainers"]] == ["merge"]
    message = '{"logprobDelta": 0.25, "logitDifference": 1e-6}'
    merged = {"name": "merge", "state": {"terminated": {"exitCode": 0, "message": message}}}
    world.run_pods(initContainerStatuses=[merged])
    decided = world.settle()
    assert decided.status.phase == "Ready" and decided.status.adapters[0].served_digest == OLD
    assert decided.status.adapters[0].probe is not None and decided.status.adapters[0].probe.logprob_delta == 0.25
    world.finetunes["bot"] = finetune(adapter=made(NEW))
    decided = world.look()
    assert world.template()["metadata"]["annotations"][workloads.DIGEST] == NEW
    assert decided.status.phase == "Progressing"
    world.run_pods(initContainerStatuses=[merged])
    assert world.settle().status.adapters[0].served_digest == NEW


def test_a_merge_that_failed_says_why() -> None:
    world = World(deployment(mode="Merge"), finetune(adapter=made(OLD)))
    world.settle()
    message = '{"failure": {"reason": "DigestMismatch", "message": "model.safetensors was changed"}}'
    crashed = {"name": "merge", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 3}
    ended = {**crashed, "lastState": {"terminated": {"exitCode": 1, "message": message}}}
    world.run_pods(ready=False, phase="Pending", initContainerStatuses=[ended])
    decided = world.settle()
    assert (decided.status.phase, decided.status.reason) == ("Failed", "DigestMismatch")


def test_a_change_of_mode_removes_the_config_map() -> None:
    world = serving()
    world.spec(mode="Merge")
    world.settle()
    assert "ConfigMap" not in world.children
    assert [c["name"] for c in world.template()["spec"]["initContainers"]] == ["merge"]


def test_a_cpu_engine_is_told_so_by_the_chart_alone() -> None:
    cpu = Settings.model_validate(
        {
            **SETTINGS.model_dump(mode="json", by_alias=True),
            "engine": {"extraArgs": ["--dtype=float32"], "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
        }
    )
    with_flags, without = (World(deployment(), finetune(adapter=made(OLD)), settings=s) for s in (cpu, SETTINGS))
    for world, expected in ((with_flags, True), (without, False)):
        world.settle()
        engine = world.template()["spec"]["containers"][0]
        assert ("--dtype=float32" in engine["args"]) is expected
        assert ("VLLM_CPU_KVCACHE_SPACE" in [v["name"] for v in engine["env"]]) is expected
