"""A run on several nodes: which of its pods speaks, whose failure counts, what it costs."""

import pytest

from finetune_operator import labels, times
from finetune_operator.api.finetune import FineTune
from finetune_operator.finetune import jobs
from finetune_operator.finetune.plan import Plan
from finetune_trainer.runspec import RENDEZVOUS_PORT
from tests.unit.operator.stations import in_training
from tests.unit.operator.test_jobs import environment, training
from tests.unit.operator.wrappers import (
    NOW,
    Object,
    ended,
    failed,
    finetune,
    later,
    pod,
    report,
    running,
    seen,
    stored,
    terminated,
    trained,
)

TWO_NODES: Object = {"resources": {"gpus": 4, "nodes": 2}}


def number(index: int, of: Object) -> Object:
    """A pod as that of an index."""
    name = f"{of['metadata']['labels']['finetune.dev/finetune']}-{index}-{of['metadata']['creationTimestamp'][-3:-1]}"
    meta = {
        **of["metadata"],
        "name": name,
        "uid": f"uid-{name}",
        "labels": {**of["metadata"]["labels"], labels.COMPLETION_INDEX: str(index)},
    }
    return {**of, "metadata": meta}


def after_failure(parent: FineTune, train: Object, *pods: Object) -> Plan:
    """The plan a while after the Job has failed with these pods."""
    return seen(parent, [ended(train, at=later(5))], list(pods), now=later(30))


def test_several_nodes_are_one_indexed_job_whose_pods_know_where_the_first_one_is() -> None:
    job = training(finetune(**TWO_NODES))
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["backoffLimit"] == 0
    subdomain = job["spec"]["template"]["spec"]["subdomain"]
    assert environment(job)["MASTER_ADDR"]["value"] == f"bot-train-01234567-1-0.{subdomain}"
    limits = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "4"


def test_the_service_by_which_pods_find_each_other_goes_with_the_job() -> None:
    job = stored(training(finetune(**TWO_NODES)))
    service = jobs.rendezvous(job)
    assert service is not None
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert service["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["ports"][0]["port"] == RENDEZVOUS_PORT
    assert jobs.rendezvous(stored(training(finetune()))) is None


def test_the_longest_names_of_service_and_pods_fit() -> None:
    name = jobs.job_name("n" * 40, "train", "0123456789abcdef", 9999)
    assert len(f"{name}-63") <= 63 and len(f"ft-{name}") <= 63


def test_it_trains_once_all_pods_run_and_says_what_the_last_one_waits_for() -> None:
    parent, _, train = in_training(**TWO_NODES)
    first = number(0, running(train))
    assert seen(parent, [train], [first]).status.reason == "Starting"
    unscheduled = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes have a free nvidia.com/gpu"}
    made = seen(parent, [train], [first, number(1, pod(train, phase="Pending", conditions=[unscheduled]))])
    assert (made.status.phase, made.status.reason) == ("Queued", "Unschedulable")
    made = seen(parent, [train], [first, number(1, running(train))])
    assert made.status.phase == "Training"


def test_the_first_pods_result_ends_the_run_and_no_other_pods_does() -> None:
    parent, _, train = in_training(**TWO_NODES)
    result = trained(train)
    imposter = seen(parent, [train], [number(0, running(train)), number(1, terminated(train, result=result))])
    assert imposter.status.phase == "Training"
    made = seen(parent, [train], [number(0, terminated(train, result=result)), number(1, running(train))])
    assert made.status.phase == "Succeeded"


def test_gpu_time_is_that_of_all_pods() -> None:
    parent, _, train = in_training(**TWO_NODES)
    pods = [number(index, running(train)) for index in (0, 1)]
    made = seen(parent, [train], pods, now=later(3600))
    assert made.status.cost is not None and made.status.cost.gpu_hours == 8
    hours = finetune(made.status.model_dump(by_alias=True), **TWO_NODES, budget={"maxGpuHours": 16})
    assert seen(hours, [train], pods, now=later(3600)).again == pytest.approx(3600)


def test_a_failure_waits_for_the_end_of_all_pods() -> None:
    parent, _, train = in_training(**TWO_NODES)
    lost = failed(train, "PeerLost")
    target = {"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"}
    job = {**train, "status": {"conditions": [target]}}
    pods = [number(0, terminated(train, 1, lost)), number(1, running(train))]
    assert seen(parent, [job], pods, report(train, result=lost.model_dump(by_alias=True))).create is None


@pytest.mark.parametrize("survivor", [0, 1])
@pytest.mark.parametrize(
    ("exit_code", "how", "reason"),
    [(137, "OOMKilled", "OutOfMemory"), (137, "Error", "Killed"), (143, "Error", "Interrupted")],
)
def test_the_pod_that_failed_first_says_why_not_the_one_that_missed_it(
    survivor: int, exit_code: int, how: str, reason: str
) -> None:
    parent, _, train = in_training(**TWO_NODES)
    made = after_failure(
        parent,
        train,
        number(survivor, terminated(train, 1, failed(train, "PeerLost"), finished=NOW)),
        number(1 - survivor, terminated(train, exit_code, reason=how, finished=later(1))),
    )
    assert made.failure == reason


def test_a_failure_that_a_later_pod_tells_is_shown_with_its_name() -> None:
    parent, _, train = in_training(**TWO_NODES)
    made = after_failure(
        parent,
        train,
        number(0, terminated(train, 143, finished=later(2))),
        number(1, terminated(train, 1, failed(train, "GPUNotVisible", "torch sees 0"), finished=NOW)),
    )
    assert made.status.phase == "Failed" and made.status.reason == "GPUNotVisible"
    assert "pod bot-1-00: torch sees 0" in made.status.message


def test_pods_that_only_miss_each_other_are_tried_again_as_infrastructure() -> None:
    parent, _, train = in_training(**TWO_NODES)
    pods = [number(index, terminated(train, 1, failed(train, "PeerLost"))) for index in (0, 1)]
    made = after_failure(parent, train, *pods)
    assert made.create is not None and made.failure == "PeerLost"
    assert made.status.run is not None and made.status.run.infrastructure_retries == 1


def test_an_eviction_that_stops_all_pods_counts_once() -> None:
    parent, _, train = in_training(**TWO_NODES)
    stopped = [number(index, terminated(train, 143)) for index in (0, 1)]
    later_on = times.rfc3339(later(30))
    again = [number(index, {**running(train), "metadata": {**running(train)["metadata"], "creationTimestamp": later_on}})
             for index in (0, 1)]  # fmt: skip
    made = seen(parent, [train], stopped + again, now=later(40))
    assert made.status.phase == "Training"
    result = number(0, terminated(train, result=trained(train)))
    done = seen(parent, [train], [*stopped, result, again[1]], now=later(50))
    assert done.status.run is not None and done.status.run.disruptions == 1


def test_a_lost_node_among_several_is_given_up_on() -> None:
    parent, _, train = in_training(**TWO_NODES)
    silent = number(0, running(train))
    silent["metadata"]["deletionTimestamp"] = "2026-11-22T12:02:00Z"
    survivor = number(1, terminated(train, 1, failed(train, "PeerLost")))
    made = seen(parent, [train], [silent, survivor], now=later(181))
    assert made.failure == "NodeLost" and made.delete == (train,)
