"""Every decision about a FineTune, one sentence each."""

from dataclasses import replace

import pytest

from finetune_operator.api.finetunestatus import (
    EstimateStatus,
    EvaluationStatus,
    GateStatus,
    RunStatus,
    TrackerStatus,
)
from finetune_operator.finetune.plan import plan
from finetune_operator.finetune.view import view
from finetune_operator.settings import Settings
from tests.unit.operator.stations import failed_run, in_preparation, in_training, succeeded
from tests.unit.operator.wrappers import (
    NOW,
    SETTINGS,
    Object,
    adapter,
    condition,
    ended,
    failed,
    finetune,
    later,
    pod,
    prepared,
    reasons,
    report,
    reused,
    run_spec,
    running,
    seen,
    stored,
    terminated,
    trained,
    waiting,
    with_status,
)

# ---- the way of a run ------------------------------------------------------------------------------------------------


def test_a_new_object_gets_its_prepare_job_at_first_sight() -> None:
    made = seen(finetune())
    assert made.create is not None
    assert made.create["metadata"]["name"].startswith("bot-prepare-")
    assert made.status.phase == "Preparing"
    assert made.status.run is not None and made.status.run.attempt == 1
    assert made.status.run.trainer_image == "registry.example/trainer:1"
    assert reasons(made) == ["Preparing"]


def test_planning_again_before_the_status_was_written_plans_the_same_job() -> None:
    assert seen(finetune()).create == seen(finetune()).create


def test_while_the_prepare_job_runs_nothing_is_created() -> None:
    parent, job = in_preparation()
    made = seen(parent, [job], [running(job)])
    assert made.create is None and not made.delete
    assert (made.status.phase, made.status.reason) == ("Preparing", "Preparing")


def test_a_prepared_run_is_trained_with_what_prepare_found() -> None:
    parent, prepare = in_preparation()
    made = seen(parent, [prepare], [terminated(prepare, result=prepared(prepare))])
    assert made.create is not None
    assert made.create["metadata"]["name"] == "bot-train-01234567-1"
    spec = run_spec(made.create)
    assert spec["prepared"]["dataset"]["uri"] == "s3://finetune/datasets/ab"
    assert spec["prepared"]["totalSteps"] == 40
    assert made.status.phase == "Queued"
    assert condition(made, "DatasetValid") == ("True", "Checked")
    assert condition(made, "FitsGPU") == ("True", "Fits")
    assert made.status.summary is not None and made.status.summary.progress == "0/40"


def test_a_posted_result_counts_before_the_pod_has_ended() -> None:
    parent, prepare = in_preparation()
    result = prepared(prepare).model_dump(mode="json", by_alias=True)
    made = seen(parent, [prepare], [running(prepare)], report(prepare, result=result))
    assert made.create is not None and made.create["metadata"]["name"].startswith("bot-train-")


def test_a_result_of_another_job_does_not_count() -> None:
    parent, prepare = in_preparation()
    foreign = prepared(prepare).model_copy(update={"job": "another"})
    made = seen(parent, [prepare], [terminated(prepare, result=foreign)])
    assert made.create is None


def test_training_shows_step_loss_and_eta_from_the_reports() -> None:
    parent, prepare, train = in_training()
    progress = {"step": 12, "totalSteps": 40, "loss": 1.4118, "etaSeconds": 170, "reportedAt": "2026-11-22T12:00:00Z"}
    made = seen(parent, [prepare, train], [running(train)], report(train, progress=progress))
    assert made.status.phase == "Training"
    summary = made.status.summary
    assert summary is not None
    assert (summary.progress, summary.loss, summary.eta) == ("12/40", "1.412", "3m")


def test_all_steps_done_but_no_result_yet_means_that_it_evaluates() -> None:
    parent, prepare, train = in_training()
    made = seen(parent, [prepare, train], [running(train)], report(train, progress={"step": 40, "totalSteps": 40}))
    assert made.status.phase == "Evaluating"


def test_a_trained_run_succeeds_with_its_adapter() -> None:
    parent, prepare, train = in_training()
    made = seen(parent, [prepare, train], [terminated(train, result=trained(train))])
    assert (made.status.phase, made.status.reason) == ("Succeeded", "Trained")
    assert made.status.adapter == adapter()
    assert condition(made, "Complete") == ("True", "Trained")
    assert condition(made, "GatePassed")[0] == "True"
    assert made.status.history[0].digest == adapter().digest
    assert made.status.history[0].result == "Succeeded"
    summary = made.status.summary
    assert summary is not None
    assert (summary.progress, summary.loss, summary.eval, summary.adapter) == (
        "40/40",
        "0.913",
        "1.021",
        "abababababab",
    )
    assert "Succeeded" in reasons(made)


def test_an_adapter_that_is_in_the_bucket_already_is_reused_without_a_train_job() -> None:
    parent, prepare = in_preparation()
    made = seen(parent, [prepare], [terminated(prepare, result=prepared(prepare, reused=reused()))])
    assert made.create is None
    assert (made.status.phase, made.status.reason) == ("Succeeded", "ReusedExisting")
    assert made.status.adapter == adapter()


def test_a_run_that_cannot_fit_fails_before_a_gpu_is_asked_for() -> None:
    parent, prepare = in_preparation()
    verdict = EstimateStatus(verdict="DoesNotFit", message="needs 31Gi of 24Gi; training.maxLength 512 would fit")
    made = seen(parent, [prepare], [terminated(prepare, result=prepared(prepare, estimate=verdict))])
    assert made.create is None
    assert (made.status.phase, made.status.reason) == ("Failed", "DoesNotFit")
    assert "training.maxLength 512 would fit" in made.status.message
    assert condition(made, "FitsGPU") == ("False", "DoesNotFit")


def test_a_failed_gate_does_not_fail_the_run() -> None:
    parent, prepare, train = in_training()
    evaluation = EvaluationStatus(
        adapter={"loss": 1.5}, gates=[GateStatus(metric="loss", passed=False, message="loss 1.5 > 1.2")], passed=False
    )
    result = trained(train, adapter=adapter(passed=False), evaluation=evaluation)
    made = seen(parent, [prepare, train], [terminated(train, result=result)])
    assert made.status.phase == "Succeeded"
    assert condition(made, "Complete")[0] == "True"
    assert condition(made, "GatePassed") == ("False", "GateNotPassed")
    assert any("loss 1.5 > 1.2" in event.note for event in made.events)


# ---- after the end ---------------------------------------------------------------------------------------------------


def test_what_a_tracker_did_not_take_is_in_status_and_an_event_and_the_run_succeeds() -> None:
    parent, prepare, train = in_training()
    told = [
        TrackerStatus(name="MLflow", url="http://mlflow/run", message="3 of 40 steps are missing there: no route"),
        TrackerStatus(name="WandB", url="https://wandb/run"),
    ]
    made = seen(parent, [prepare, train], [terminated(train, result=trained(train, tracking=told))])
    assert (
        made.status.phase == "Succeeded" and made.status.progress is not None and made.status.progress.tracking == told
    )
    [event] = [event for event in made.events if event.reason == "TrackingIncomplete"]
    assert event.note == "MLflow: 3 of 40 steps are missing there: no route" and event.type == "Warning"


def test_a_succeeded_run_is_never_run_again_when_its_jobs_and_pods_vanish() -> None:
    parent, _ = succeeded()
    made = seen(parent)
    assert made.create is None
    assert made.status == parent.status


def test_a_newer_trainer_image_in_the_chart_trains_nothing_again() -> None:
    parent, _ = succeeded()
    newer = SETTINGS.model_copy(update={"images": SETTINGS.images.model_copy(update={"trainer": "trainer:2"})})
    assert seen(parent, settings=newer).create is None


def test_jobs_are_kept_for_their_logs_until_the_ttl_is_over() -> None:
    parent, jobs = succeeded()
    made = seen(parent, jobs, now=later(3599))
    assert not made.delete
    assert made.again == pytest.approx(1)
    assert seen(parent, jobs, now=later(3601)).delete == tuple(jobs)


def test_an_edit_of_what_is_not_trained_starts_nothing() -> None:
    parent, jobs = succeeded()
    edited = finetune(
        parent.status.model_dump(by_alias=True), generation=2, ttlAfterFinished="2h", retry={"infrastructure": 1}
    )
    made = seen(edited, jobs)
    assert made.create is None and not made.delete
    assert made.status.observed_generation == 2


def test_a_failed_run_stays_failed_when_its_job_vanishes() -> None:
    parent, _, _ = failed_run()
    assert seen(parent).create is None


# ---- edits -----------------------------------------------------------------------------------------------------------


def test_an_edit_of_what_is_trained_cancels_the_run_and_starts_the_next() -> None:
    parent, prepare, train = in_training()
    edited = with_status(parent, seen(parent, [prepare, train], [running(train)]), training={"maxSteps": 7})
    made = seen(edited, [prepare, train], [running(train)])
    assert {job["metadata"]["name"] for job in made.delete} == {prepare["metadata"]["name"], train["metadata"]["name"]}
    assert made.create is not None
    assert made.create["metadata"]["name"] != prepare["metadata"]["name"]
    assert made.status.history[0].result == "Cancelled"
    assert made.status.run is not None and made.status.run.id == ""
    assert reasons(made) == ["Cancelled", "Preparing"]


def test_an_edit_after_success_leaves_the_last_adapter_in_place() -> None:
    parent, jobs = succeeded()
    edited = finetune(parent.status.model_dump(by_alias=True), training={"maxSteps": 7})
    made = seen(edited, jobs)
    assert made.create is not None
    assert made.status.adapter == adapter()
    assert made.status.history[0].result == "Succeeded"
    assert made.status.summary is not None and made.status.summary.adapter == "abababababab"


def test_an_edit_back_is_a_new_run_of_the_first_inputs() -> None:
    parent, _ = succeeded()
    away = seen(finetune(parent.status.model_dump(by_alias=True), training={"maxSteps": 7}))
    back = seen(with_status(parent, away))
    assert back.create is not None and parent.status.run is not None
    assert back.create["metadata"]["name"] == f"bot-prepare-{parent.status.run.inputs[:8]}"


def test_training_of_the_new_run_waits_until_the_old_pod_has_let_go_of_its_gpu() -> None:
    parent, prepare, train = in_training()
    edited = with_status(parent, seen(parent, [prepare, train], [running(train)]), training={"maxSteps": 7})
    made = seen(edited, [prepare, train], [running(train)])
    again, second = with_status(edited, made), stored(made.create)
    result = terminated(second, result=prepared(second, run_id="fedcba9876543210"))
    held = seen(again, [second], [running(train), result])
    assert held.create is None
    assert (held.status.phase, held.status.reason) == ("Queued", "WaitingForPod")
    freed = seen(with_status(again, held), [second], [result])
    assert freed.create is not None and freed.create["metadata"]["name"] == "bot-train-fedcba98-1"


# ---- suspension ------------------------------------------------------------------------------------------------------


def test_suspend_deletes_the_job_and_counts_as_suspended_once_the_pod_is_gone() -> None:
    parent, prepare, train = in_training(suspend=False)
    asked = with_status(parent, seen(parent, [prepare, train], [running(train)]), suspend=True)
    made = seen(asked, [prepare, train], [running(train)])
    assert [job["metadata"]["name"] for job in made.delete] == [train["metadata"]["name"]]
    assert made.status.phase == "Suspended"
    assert condition(made, "Suspended")[0] == "False"
    gone = seen(with_status(asked, made), [prepare])
    assert condition(gone, "Suspended") == ("True", "Suspended")
    assert gone.create is None


def test_a_resumed_run_goes_on_with_its_next_attempt_at_no_cost_of_a_retry() -> None:
    parent, prepare, train = in_training()
    asked = with_status(parent, seen(parent, [prepare, train], [running(train)]), suspend=True)
    stopped = with_status(asked, seen(asked, [prepare, train], [running(train)]))
    idle = with_status(stopped, seen(stopped, [prepare]))
    made = seen(idle.model_copy(update={"spec": parent.spec}), [prepare])
    assert made.create is not None
    assert made.create["metadata"]["name"] == "bot-train-01234567-2"
    assert made.status.run is not None
    assert (made.status.run.infrastructure_retries, made.status.run.disruptions) == (0, 1)


def test_a_new_object_that_is_suspended_waits_without_a_job() -> None:
    parent = finetune(suspend=True)
    made = seen(parent)
    assert made.create is None
    assert made.status.phase == "Suspended"
    resumed = seen(with_status(parent, made, suspend=False))
    assert resumed.create is not None and resumed.create["metadata"]["name"].startswith("bot-prepare-")


def test_suspending_a_succeeded_run_changes_nothing() -> None:
    parent, jobs = succeeded()
    suspended = finetune(parent.status.model_dump(by_alias=True), suspend=True)
    assert seen(suspended, jobs).status.phase == "Succeeded"


def test_suspending_and_resuming_a_failed_run_tries_it_again() -> None:
    parent, job, _ = failed_run()
    asked = finetune(parent.status.model_dump(by_alias=True), suspend=True)
    stopped = seen(asked, [job])
    made = seen(
        with_status(asked, seen(with_status(asked, stopped), [job])).model_copy(update={"spec": parent.spec}), [job]
    )
    assert made.create is not None
    assert made.create["metadata"]["name"].endswith("-2")


# ---- failures --------------------------------------------------------------------------------------------------------


def test_bad_rows_fail_the_run_at_once_with_file_and_line() -> None:
    parent, prepare = in_preparation()
    result = failed(prepare, "InvalidDataset", "train.jsonl:3: 'messages' is not a list")
    made = seen(parent, [ended(prepare)], [terminated(prepare, 1, result)])
    assert made.create is None
    assert (made.status.phase, made.status.reason) == ("Failed", "InvalidDataset")
    assert "train.jsonl:3" in made.status.message and "onInvalidRow" in made.status.message
    assert condition(made, "DatasetValid") == ("False", "InvalidDataset")
    assert condition(made, "Failed") == ("True", "InvalidDataset")
    assert made.failure == "InvalidDataset"


def test_infrastructure_failures_are_tried_again_after_a_pause_that_doubles() -> None:
    parent, prepare = in_preparation()
    broken = [ended(prepare)], [terminated(prepare, 1, failed(prepare, "StorageUnavailable", "no answer from minio"))]
    first = seen(parent, *broken, now=later(4))
    assert first.create is None
    assert first.again == pytest.approx(6)
    assert first.status.reason == "StorageUnavailable" and first.status.phase == "Preparing"
    made = seen(with_status(parent, first), *broken, now=later(10))
    assert made.create is not None and made.create["metadata"]["name"].endswith("-2")
    assert made.status.run is not None and made.status.run.infrastructure_retries == 1
    second = ended(stored(made.create), at=later(20))
    then = seen(
        with_status(parent, made),
        [second],
        [terminated(second, 1, failed(second, "StorageUnavailable"))],
        now=later(20),
    )
    assert then.again == pytest.approx(20)


def test_infrastructure_failures_end_the_run_when_the_retries_are_used_up() -> None:
    parent, _, made = failed_run("StorageUnavailable", retry={"infrastructure": 0})
    assert made.status.phase == "Failed"
    assert "retry.infrastructure" in made.status.message
    raised = finetune(parent.status.model_dump(by_alias=True), retry={"infrastructure": 1})
    assert seen(raised).create is not None


def test_an_error_that_nobody_foresaw_is_tried_again_once_when_no_step_is_made() -> None:
    parent, prepare, first = failed_run("InternalError")
    assert first.again is not None
    died = [terminated(prepare, 1, failed(prepare, "InternalError", "KeyError: 'x'"))]
    made = seen(parent, [prepare], died, now=later(11))
    assert made.create is not None
    second = ended(stored(made.create), at=later(20))
    dead = terminated(second, 1, failed(second, "InternalError", "KeyError: 'x'"))
    then = seen(with_status(parent, made), [second], [dead], now=later(20))
    assert (then.status.phase, then.status.reason, then.create) == ("Failed", "InternalError", None)
    assert "KeyError: 'x'. Not tried again: a retry has not made a step either." in then.status.message
    raised = finetune(with_status(parent, then).status.model_dump(by_alias=True), retry={"infrastructure": 9})
    assert seen(raised).create is None


def test_an_error_that_nobody_foresaw_late_in_training_is_tried_again_like_any_of_the_infrastructure() -> None:
    parent, prepare, train = in_training()
    trained_for_a_while = report(train, progress={"step": 30, "totalSteps": 40})
    known = with_status(parent, seen(parent, [prepare, train], [running(train)], trained_for_a_while))
    status = known.status.model_dump(by_alias=True)
    status["run"]["infrastructureRetries"] = 3
    dead = terminated(train, 1, failed(train, "InternalError", "cuBLAS error"))
    made = seen(finetune(status), [prepare, ended(train)], [dead], now=later(100))
    assert made.create is not None
    assert made.status.run is not None and made.status.run.infrastructure_retries == 4


@pytest.mark.parametrize("reason", ["OOMKilled", "CUDAOutOfMemory"])
def test_out_of_memory_halves_the_micro_batch_and_says_so(reason: str) -> None:
    parent, prepare, train = in_training()
    dead = (
        terminated(train, 137, reason="OOMKilled")
        if reason == "OOMKilled"
        else terminated(train, 1, failed(train, "CUDAOutOfMemory", "CUDA out of memory"))
    )
    made = seen(parent, [prepare, ended(train)], [dead])
    assert run_spec(made.create)["microBatch"] == 4
    run = made.status.run
    assert run is not None and (run.out_of_memory_retries, run.micro_batch) == (1, 4)
    assert "micro batch 8 -> 4" in run.changed[0] and "effective batch stays 16" in run.changed[0]
    again = stored(made.create)
    dead = terminated(again, 137, reason="OOMKilled")
    assert run_spec(seen(with_status(parent, made), [prepare, ended(again)], [dead]).create)["microBatch"] == 2


def test_the_micro_batch_that_is_halved_is_the_one_that_the_pod_computed() -> None:
    parent, prepare, train = in_training()
    told = report(train, loading=False, microBatch=4)
    assert (seen(parent, [prepare, train], [running(train)], told).status.run or RunStatus()).micro_batch == 4
    made = seen(parent, [prepare, ended(train)], [terminated(train, 137, reason="OOMKilled")], told)
    assert run_spec(made.create)["microBatch"] == 2
    assert made.status.run is not None and "micro batch 4 -> 2" in made.status.run.changed[0]


def test_a_pod_that_said_nothing_had_at_most_its_share_of_the_batch() -> None:
    parent, prepare, train = in_training(resources={"gpus": 4})
    made = seen(parent, [prepare, ended(train)], [terminated(train, 137, reason="OOMKilled")])
    assert made.status.run is not None and "micro batch 4 -> 2" in made.status.run.changed[0]


def test_out_of_memory_before_the_model_is_loaded_is_not_answered_with_a_smaller_micro_batch() -> None:
    parent, prepare, train = in_training()
    told = report(train, loading=True)
    shown = seen(parent, [prepare, train], [running(train)], told).status
    assert shown.phase == "Training" and "fetches and loads the base model" in shown.message
    made = seen(parent, [prepare, ended(train)], [terminated(train, 137, reason="OOMKilled")], told)
    assert made.create is None and made.status.phase == "Failed"
    assert "while the base model was loaded" in made.status.message and "raise resources.memory" in made.status.message
    # Its word may be forgotten by then: a failed run is not begun again.
    assert seen(with_status(parent, made), [prepare, ended(train)]).create is None


def test_what_a_pod_waits_for_in_the_bucket_is_shown_and_told_once() -> None:
    parent, prepare, train = in_training()
    progress = {"step": 12, "totalSteps": 40}
    text = "uploading s3://finetune/runs/1/state.json: http://minio:9000 does not answer (Connection refused)"
    waits = seen(parent, [prepare, train], [running(train)], report(train, progress=progress, waitsFor=text))
    assert (waits.status.phase, waits.status.reason) == ("Training", "StorageUnavailable")
    assert text in waits.status.message and "goes on by itself" in waits.status.message
    assert [(event.reason, event.type) for event in waits.events] == [("StorageUnavailable", "Warning")]
    known = with_status(parent, waits)
    assert not seen(known, [prepare, train], [running(train)], report(train, progress=progress, waitsFor=text)).events
    answers = seen(known, [prepare, train], [running(train)], report(train, progress=progress, waitsFor=""))
    assert answers.status.reason == "Training"


@pytest.mark.parametrize(
    "message",
    [
        "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ",
        'Container trainer exceeded its local ephemeral storage limit "1Gi". ',
        'Usage of EmptyDir volume "work" exceeds the limit "1Gi". ',
    ],
)
def test_a_pod_over_its_own_disk_limit_is_not_replaced_for_ever(message: str) -> None:
    parent, prepare, train = in_training()
    evicted = pod(train, phase="Failed", reason="Evicted", message=message)
    # The Job is not over: its controller ignores the exit code of a pod that was told to stop.
    made = seen(parent, [prepare, train], [evicted, running(train, "next")], now=later(11))
    assert made.failure == "DiskLimitExceeded" and made.delete == (train,)
    assert made.status.run is not None and made.status.run.infrastructure_retries == 1
    assert message.strip() in made.events[0].note and "LimitRange" in made.events[0].note
    again = stored(made.create)
    evicted = pod(again, phase="Failed", reason="Evicted", message=message)
    over = seen(with_status(parent, made), [prepare, ended(again)], [evicted], now=later(60))
    assert over.status.phase == "Failed" and over.status.reason == "DiskLimitExceeded" and over.create is None


@pytest.mark.parametrize(("resource", "reason"), [("memory", "OutOfMemory"), ("ephemeral-storage", "DiskFull")])
def test_a_pod_that_is_evicted_for_what_it_used_beyond_its_request_is_at_fault(resource: str, reason: str) -> None:
    parent, prepare, train = in_training()

    def evicted(used: str) -> Object:
        message = (
            f"The node was low on resource: {resource}. Threshold quantity: 100Mi, available: 10Mi. "
            f"Container trainer was using {used}, request is 0, has larger consumption of {resource}. "
        )
        disruption = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]
        return pod(train, phase="Failed", reason="Evicted", message=message, conditions=disruption)

    made = seen(parent, [prepare, train], [evicted("20971520Ki")], now=later(11))
    assert made.failure == reason and made.delete == (train,)
    run = made.status.run
    assert run is not None and run.infrastructure_retries + run.out_of_memory_retries == 1
    assert "Container trainer was using 20971520Ki" in made.events[0].note
    if resource == "ephemeral-storage":
        assert not seen(parent, [prepare, train], [evicted("60Ki")], now=later(11)).failure


def test_a_pod_that_the_job_controller_replaces_is_told_of_once() -> None:
    parent, prepare, train = in_training()
    parent = with_status(parent, seen(parent, [prepare, train], [running(train)]))
    disruption = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]
    lost = pod(train, phase="Failed", reason="Evicted", message="The node had disk pressure.", conditions=disruption)
    next_pod = pod(train, "next", phase="Pending")
    made = seen(parent, [prepare, train], [lost, next_pod])
    assert (made.status.phase, made.create) == ("Queued", None)
    ((reason, note),) = [(event.reason, event.note) for event in made.events]
    assert reason == "Evicted" and "disk pressure; the next pod goes on from the last checkpoint" in note
    assert not seen(with_status(parent, made), [prepare, train], [lost, next_pod]).events


def test_out_of_memory_with_a_micro_batch_of_one_ends_the_run_and_does_not_loop() -> None:
    parent, prepare, train = in_training(training={"microBatchSize": 1})
    made = seen(parent, [prepare, ended(train)], [terminated(train, 137, reason="OOMKilled")])
    assert made.status.phase == "Failed" and "raise resources.memory" in made.status.message
    assert seen(with_status(parent, made), [prepare, ended(train)]).create is None


def test_prepare_out_of_memory_names_the_chart_value() -> None:
    parent, prepare = in_preparation()
    made = seen(parent, [ended(prepare)], [terminated(prepare, 137, reason="OOMKilled")])
    assert made.status.phase == "Failed" and "prepare.memory" in made.status.message


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"reason": "Evicted", "message": "low on disk"}, "Evicted"),
        (
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]},
            "Preempted",
        ),
        (
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}]},
            "NodeLost",
        ),
    ],
)
def test_disruptions_cost_no_retry(status: Object, reason: str) -> None:
    parent, prepare, train = in_training()
    made = seen(parent, [prepare, ended(train)], [pod(train, phase="Failed", **status)], now=later(5))
    assert made.create is not None and made.create["metadata"]["name"].endswith("-2")
    run = made.status.run
    assert run is not None and (run.infrastructure_retries, run.disruptions) == (0, 1)
    assert made.failure == reason


def test_exit_143_without_a_disruption_costs_no_retry_either() -> None:
    parent, prepare, train = in_training()
    made = seen(parent, [prepare, ended(train)], [terminated(train, 143)], now=later(5))
    assert made.create is not None and made.failure == "Interrupted"
    assert made.status.run is not None and made.status.run.infrastructure_retries == 0


def test_a_killed_process_is_tried_again_as_infrastructure() -> None:
    parent, prepare, train = in_training()
    made = seen(parent, [prepare, ended(train)], [terminated(train, 137)], now=later(11))
    assert made.failure == "Killed"
    assert made.status.run is not None and made.status.run.infrastructure_retries == 1


def test_a_job_that_somebody_deleted_is_followed_by_the_next_attempt() -> None:
    parent, prepare, train = in_training()
    running_status = with_status(parent, seen(parent, [prepare, train], [running(train)]))
    made = seen(running_status, [prepare])
    assert made.create is not None and made.create["metadata"]["name"] == "bot-train-01234567-2"
    assert reasons(made)[0] == "JobDeleted"


def test_a_crash_without_a_result_shows_the_last_line_of_the_log() -> None:
    parent, prepare, train = in_training()
    crashed = terminated(train, 139, message="loading\nSegmentation fault")
    made = seen(parent, [prepare, ended(train)], [crashed])
    assert made.status.reason == "InternalError" and "Segmentation fault" in made.status.message


def test_a_failure_is_not_counted_twice_while_the_next_attempt_waits_for_a_pod() -> None:
    parent, prepare, train = in_training()
    old = {**running(train, "old-pod")}
    old["metadata"] = {**old["metadata"], "ownerReferences": []}
    dead = terminated(train, 1, failed(train, "StorageUnavailable"))
    made = seen(parent, [prepare, ended(train)], [dead, old], now=later(11))
    assert made.create is None
    assert made.status.run is not None and made.status.run.infrastructure_retries == 0
    assert made.status.reason == "WaitingForPod"


# ---- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting_reason", "message", "reason"),
    [
        ("ImagePullBackOff", 'Back-off pulling image "registry.example/trainer:1"', "ImagePullFailed"),
        ("CreateContainerConfigError", 'secret "finetune-storage" not found', "MissingReference"),
    ],
)
def test_what_a_pod_waits_for_is_shown_with_the_object_it_names(waiting_reason: str, message: str, reason: str) -> None:
    parent, prepare = in_preparation()
    made = seen(parent, [prepare], [waiting(prepare, waiting_reason, message)])
    assert (made.status.phase, made.status.reason) == ("Preparing", reason)
    assert message in made.status.message
    assert condition(made, "Complete") == ("False", reason)


def test_a_pod_without_a_node_shows_what_the_scheduler_says() -> None:
    parent, prepare, train = in_training()
    text = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    unscheduled = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}]
    made = seen(parent, [prepare, train], [pod(train, phase="Pending", conditions=unscheduled)])
    assert (made.status.phase, made.status.reason) == ("Queued", "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in made.status.message


def test_what_only_an_event_tells_is_shown_too() -> None:
    parent, prepare = in_preparation()
    stuck = waiting(prepare, "ContainerCreating")
    told = {stuck["metadata"]["uid"]: ("MountFailed", 'configmap "data" not found')}
    made = seen(parent, [prepare], [stuck], explanations=told)
    assert made.status.reason == "MountFailed" and 'configmap "data" not found' in made.status.message


def test_an_image_that_cannot_be_pulled_does_not_hold_a_gpu_for_ever() -> None:
    parent, prepare, train = in_training()
    stuck = waiting(train, "ImagePullBackOff", "not found")
    made = seen(parent, [prepare, train], [stuck], now=later(901))
    assert made.delete == (train,)
    assert made.create is not None and made.failure == "ImagePullFailed"


def test_a_job_that_kueue_holds_back_is_queued() -> None:
    parent, prepare, train = in_training(queueName="gpus")
    assert train["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    held = {**train, "spec": {**train["spec"], "suspend": True}}
    made = seen(parent, [prepare, held])
    assert (made.status.phase, made.status.reason) == ("Queued", "WaitingForQuota")


# ---- limits and cost -------------------------------------------------------------------------------------------------


def priced() -> Settings:
    return SETTINGS.model_copy(update={"price_per_gpu_hour": 2.0})


def test_gpu_time_is_added_up_over_attempts_and_priced() -> None:
    parent, prepare, train = in_training()
    killed = terminated(train, 137, started=NOW, finished=later(1800))
    made = seen(parent, [prepare, ended(train, at=later(1800))], [killed], settings=priced(), now=later(1820))
    assert made.status.run is not None and made.status.run.gpu_seconds == 1800
    second = stored(made.create)
    then = seen(
        with_status(parent, made),
        [prepare, second],
        [running(second, since=later(1800))],
        settings=priced(),
        now=later(3600),
    )
    assert then.status.cost is not None
    assert (then.status.cost.gpu_hours, then.status.cost.amount) == (1.0, 2.0)


def test_a_run_on_the_cpu_costs_no_gpu_time() -> None:
    parent, prepare, train = in_training(resources={"gpus": 0})
    made = seen(parent, [prepare, train], [running(train)], now=later(7200))
    assert made.status.cost is not None and made.status.cost.gpu_hours == 0


def test_a_budget_that_is_used_up_stops_the_run_and_a_raised_one_goes_on() -> None:
    parent, prepare, train = in_training(budget={"maxGpuHours": 1})
    early = seen(parent, [prepare, train], [running(train)], now=later(1800))
    assert early.again == pytest.approx(1800)
    made = seen(parent, [prepare, train], [running(train)], now=later(3600))
    assert made.delete == (train,)
    assert (made.status.phase, made.status.reason) == ("Failed", "BudgetExceeded")
    stopped = with_status(parent, made, budget={"maxGpuHours": 1})
    assert seen(stopped, [prepare], now=later(3700)).create is None
    raised = finetune(stopped.status.model_dump(by_alias=True), budget={"maxGpuHours": 2})
    going = seen(raised, [prepare], now=later(3700))
    assert going.create is not None and going.create["metadata"]["name"] == "bot-train-01234567-2"


def test_the_active_deadline_stops_the_run() -> None:
    parent, prepare, train = in_training(activeDeadline="1h")
    made = seen(parent, [prepare, train], [running(train)], now=later(3601))
    assert made.status.reason == "DeadlineExceeded" and made.delete == (train,)


def test_a_result_that_arrived_counts_even_if_the_deadline_is_over() -> None:
    parent, prepare, train = in_training(activeDeadline="1h")
    made = seen(parent, [prepare, train], [terminated(train, result=trained(train))], now=later(3700))
    assert made.status.phase == "Succeeded"


# ---- the status itself -----------------------------------------------------------------------------------------------


def test_looking_twice_at_the_same_changes_nothing() -> None:
    parent, prepare, train = in_training()
    once = with_status(parent, seen(parent, [prepare, train], [running(train)]))
    assert seen(once, [prepare, train], [running(train)], now=later(20)).status == once.status


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    parent, prepare = in_preparation()
    made = seen(parent, [prepare], [terminated(prepare, result=prepared(prepare))], now=later(60))
    times = {c.type: c.last_transition_time for c in made.status.conditions}
    assert times["DatasetValid"] == "2026-11-22T12:01:00Z"
    assert times["Complete"] == "2026-11-22T12:00:00Z"


def test_the_history_keeps_the_newest_adapter_that_may_be_served() -> None:
    parent, _ = succeeded()
    for number in range(12):
        made = seen(finetune(parent.status.model_dump(by_alias=True), training={"maxSteps": number + 1}))
        job = stored(made.create)
        bad = failed(job, "InvalidDataset")
        parent = with_status(parent, made, training={"maxSteps": number + 1})
        parent = with_status(parent, seen(parent, [ended(job)], [terminated(job, 1, bad)]))
    assert len(parent.status.history) == 10
    assert parent.status.history[-1].digest == adapter().digest


def test_a_prepare_job_whose_image_is_gone_is_replaced_by_one_with_the_charts_newer_image() -> None:
    parent, prepare = in_preparation()
    stuck = waiting(prepare, "ImagePullBackOff", "not found")
    newer = SETTINGS.model_copy(update={"images": SETTINGS.images.model_copy(update={"trainer": "trainer:2"})})
    made = seen(parent, [prepare], [stuck], settings=newer, now=later(30))
    assert made.delete == (prepare,) and made.create is not None
    assert made.create["spec"]["template"]["spec"]["containers"][0]["image"] == "trainer:2"
    assert made.status.run is not None and made.status.run.trainer_image == "trainer:2"


def test_a_prepared_run_keeps_its_trainer_image_over_an_upgrade() -> None:
    parent, prepare, train = in_training()
    newer = SETTINGS.model_copy(update={"images": SETTINGS.images.model_copy(update={"trainer": "trainer:2"})})
    made = seen(parent, [prepare, ended(train)], [terminated(train, 137)], settings=newer, now=later(11))
    assert run_spec(made.create)["trainerImage"] == "registry.example/trainer:1"


def test_a_pod_on_a_node_that_fell_silent_is_replaced_once_its_grace_period_is_long_over() -> None:
    parent, prepare, train = in_training()
    leaving = running(train)
    leaving["metadata"]["deletionTimestamp"] = "2026-11-22T12:02:00Z"
    patient = seen(parent, [prepare, train], [leaving], now=later(150))
    assert patient.create is None and patient.again == pytest.approx(30)
    made = seen(parent, [prepare, train], [leaving], now=later(181))
    assert made.delete == (train,) and made.failure == "NodeLost"
    assert made.create is not None and made.create["metadata"]["name"].endswith("-2")
    assert made.status.run is not None and made.status.run.infrastructure_retries == 0


def test_a_run_that_another_object_trains_is_waited_for_and_then_taken_over() -> None:
    parent, prepare = in_preparation()
    pods = [terminated(prepare, result=prepared(prepare))]
    held = plan(replace(view(parent, [prepare], pods, {}, {}, SETTINGS, NOW), twin="FineTune demo/other"))
    assert held.create is None
    assert (held.status.phase, held.status.reason) == ("Queued", "SameRunElsewhere")
    assert "FineTune demo/other trains the same run" in held.status.message
    still = with_status(parent, held)
    again = plan(replace(view(still, [prepare], [], {}, {}, SETTINGS, NOW), twin="FineTune demo/other"))
    assert again.create is None and again.status == still.status
    freed = seen(still, [ended(prepare, "Complete")])
    assert freed.create is not None and freed.create["metadata"]["name"] == f"{prepare['metadata']['name']}-2"
    second = stored(freed.create)
    made = seen(with_status(still, freed), [second], [terminated(second, result=prepared(second, reused=reused()))])
    assert (made.status.phase, made.status.reason) == ("Succeeded", "ReusedExisting")
