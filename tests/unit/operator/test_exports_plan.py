"""Every decision about exports, one sentence each: what is made after training, again after an edit, and after failures."""

from finetune_operator.api.finetune import FineTune
from finetune_operator.api.finetunestatus import EvaluationStatus, ExportStatus, GateStatus
from finetune_operator.finetune.plan import Plan
from finetune_trainer.runspec import ExportResult, Result
from tests.unit.operator.stations import in_preparation, just_trained
from tests.unit.operator.wrappers import (
    DIGEST,
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
    reused,
    run_spec,
    running,
    seen,
    stored,
    terminated,
    with_status,
)

MERGED: Object = {"exports": ["Merged"]}
HUB: Object = {"hub": {"repo": "acme/bot", "tokenSecretRef": {"name": "hub"}}}


def exported(job: Object) -> Result:
    made = ExportStatus(type="Merged", uri="s3://finetune/merged/ab", digest=DIGEST, size_bytes=7)
    return Result(stage="export", job=job["metadata"]["name"], exported=ExportResult(exports=[made]))


def exporting(output: Object = MERGED) -> tuple[FineTune, list[Object], Object]:
    """A FineTune whose export Job was created, its earlier Jobs, and that Job."""
    parent, jobs, made = just_trained(output=output)
    return parent, jobs, stored(made.create)


def done(output: Object = MERGED) -> tuple[FineTune, list[Object]]:
    parent, jobs, export = exporting(output)
    made = seen(parent, [*jobs, export], [terminated(export, result=exported(export))])
    return with_status(parent, made), [*jobs, ended(export, "Complete")]


def broken(reason: str = "HubUnauthorized") -> tuple[FineTune, list[Object], Plan]:
    parent, jobs, export = exporting({**MERGED, **HUB})
    made = seen(parent, [*jobs, ended(export)], [terminated(export, 1, failed(export, reason))])
    return with_status(parent, made), [*jobs, ended(export)], made


def edited(parent: FineTune, output: Object) -> FineTune:
    return finetune(parent.status.model_dump(by_alias=True), generation=2, output=output)


# ---- after training --------------------------------------------------------------------------------------------------


def test_exports_are_made_by_a_job_of_their_own_that_knows_base_model_and_adapter() -> None:
    _, _, made = just_trained(output=MERGED)
    assert made.create is not None
    assert made.create["metadata"]["name"] == "bot-export-01234567-1"
    spec = run_spec(made.create)
    assert spec["stage"] == "export"
    assert spec["prepared"]["baseModel"]["digest"] == DIGEST
    assert spec["trained"]["adapter"]["digest"] == adapter().digest
    assert reasons(made) == ["Trained", "Exporting"]


def test_while_it_exports_the_run_is_not_complete_but_its_adapter_may_be_served() -> None:
    parent, jobs, export = exporting()
    made = seen(parent, [*jobs, export], [running(export)])
    assert (made.status.phase, made.status.reason) == ("Exporting", "Exporting")
    assert condition(made, "Complete")[0] == "False"
    assert condition(made, "GatePassed")[0] == "True"
    assert made.status.adapter == adapter()
    assert made.status.run is not None and made.status.run.finished_at is None
    assert made.status.summary is not None and made.status.summary.eval == "1.021"


def test_the_run_is_complete_with_its_exports() -> None:
    parent, jobs = done()
    assert (parent.status.phase, parent.status.reason) == ("Succeeded", "Exported")
    assert [export.digest for export in parent.status.exports] == [DIGEST]
    assert "s3://finetune/merged/ab" in parent.status.message
    assert [entry.result for entry in parent.status.history] == ["Succeeded"]
    assert seen(parent, jobs).create is None and seen(parent).create is None


def test_a_push_to_a_hub_is_an_export_too() -> None:
    _, _, made = just_trained(output=HUB)
    assert made.create is not None and "-export-" in made.create["metadata"]["name"]


def test_an_adapter_that_did_not_pass_its_gates_is_not_exported() -> None:
    gates = [GateStatus(metric="loss", passed=False, message="loss 1.5 > 1.2")]
    evaluation = EvaluationStatus(adapter={"loss": 1.5}, gates=gates, passed=False)
    parent, jobs, made = just_trained({"adapter": adapter(passed=False), "evaluation": evaluation}, output=MERGED)
    assert made.create is None
    assert made.status.phase == "Succeeded"
    assert "nothing is exported" in made.status.message
    assert seen(parent, jobs).create is None


def test_an_adapter_that_is_reused_is_exported() -> None:
    parent, prepare = in_preparation(output=MERGED)
    made = seen(parent, [prepare], [terminated(prepare, result=prepared(prepare, reused=reused()))])
    assert made.create is not None and made.create["metadata"]["name"] == "bot-export-01234567-1"
    assert reasons(made) == ["Prepared", "ReusedExisting", "Exporting"]


def test_an_export_does_not_wait_for_the_pod_that_has_trained() -> None:
    parent, jobs, export = exporting()
    made = seen(parent, [*jobs, export], [running(jobs[1]), running(export)])
    assert made.status.phase == "Exporting" and made.status.reason == "Exporting"


# ---- edits -----------------------------------------------------------------------------------------------------------


def test_an_export_that_is_asked_for_later_is_made_without_training_again() -> None:
    parent, jobs, made = just_trained()
    assert made.create is None and made.status.phase == "Succeeded"
    made = seen(edited(parent, MERGED), jobs)
    assert made.create is not None
    assert made.create["metadata"]["labels"]["finetune.dev/stage"] == "export"
    assert made.status.phase == "Exporting" and not made.delete
    assert made.status.run is not None and made.status.run.finished_at is None


def test_exports_that_are_asked_for_no_longer_stay() -> None:
    parent, jobs = done()
    made = seen(edited(parent, {}), jobs)
    assert made.create is None and made.status.phase == "Succeeded"
    assert made.status.exports == parent.status.exports


def test_an_edit_while_it_exports_stops_the_job_and_starts_the_next() -> None:
    parent, jobs, export = exporting()
    changed = edited(parent, {**MERGED, "mergedPrecision": "FP32"})
    made = seen(changed, [*jobs, export], [running(export)])
    assert [job["metadata"]["name"] for job in made.delete] == ["bot-export-01234567-1"]
    assert made.create is not None and made.create["metadata"]["name"] == "bot-export-01234567-2"
    after = seen(with_status(changed, made), [*jobs, stored(made.create)], [running(stored(made.create))])
    assert after.create is None and not after.delete


def test_taking_the_export_away_while_it_is_made_ends_the_run_well() -> None:
    parent, jobs, export = exporting()
    made = seen(edited(parent, {}), [*jobs, export], [running(export)])
    assert [job["metadata"]["name"] for job in made.delete] == ["bot-export-01234567-1"]
    assert made.status.phase == "Succeeded" and made.create is None


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_failed_export_fails_the_run_and_leaves_its_adapter_in_service() -> None:
    parent, _, made = broken()
    assert (made.status.phase, made.status.reason) == ("Failed", "HubUnauthorized")
    assert made.create is None
    assert condition(made, "Complete")[0] == "False"
    assert condition(made, "GatePassed")[0] == "True"
    assert made.status.adapter == adapter()
    assert (made.status.history[0].result, made.status.history[0].digest) == ("Failed", adapter().digest)
    assert seen(parent).create is None


def test_a_failure_of_the_infrastructure_is_tried_again_as_an_export() -> None:
    parent, jobs, export = exporting()
    pods = [terminated(export, 1, failed(export, "StorageUnavailable"))]
    paused = seen(parent, [*jobs, ended(export)], pods)
    assert paused.create is None and paused.again is not None
    made = seen(with_status(parent, paused), [*jobs, ended(export)], pods, now=later(60))
    assert made.create is not None and made.create["metadata"]["name"] == "bot-export-01234567-2"
    assert made.status.run is not None and made.status.run.infrastructure_retries == 1


def test_correcting_the_output_of_a_failed_export_tries_it_again() -> None:
    parent, jobs, _ = broken()
    made = seen(edited(parent, {**MERGED, "hub": {**HUB["hub"], "repo": "acme/other"}}), jobs)
    assert made.create is not None and made.create["metadata"]["name"] == "bot-export-01234567-2"
    assert made.status.phase == "Exporting"


def test_an_export_that_succeeds_after_a_failure_is_one_run_in_the_history() -> None:
    parent, jobs, _ = broken()
    changed = edited(parent, MERGED)
    made = seen(changed, jobs)
    export = stored(made.create)
    made = seen(with_status(changed, made), [*jobs, export], [terminated(export, result=exported(export))])
    assert made.status.phase == "Succeeded"
    assert [entry.result for entry in made.status.history] == ["Succeeded"]


def test_running_out_of_memory_names_the_field_to_raise() -> None:
    parent, jobs, export = exporting()
    killed = terminated(export, 137, reason="OOMKilled")
    made = seen(parent, [*jobs, ended(export)], [killed])
    assert made.status.phase == "Failed" and "raise resources.memory" in made.status.message


def test_a_deleted_export_job_is_made_again() -> None:
    parent, jobs, _ = exporting()
    made = seen(parent, jobs)
    assert made.create is not None and made.create["metadata"]["name"] == "bot-export-01234567-2"


def test_a_run_that_used_its_gpu_budget_up_is_exported_all_the_same() -> None:
    parent, jobs, export = exporting()
    assert parent.status.run is not None
    used = parent.status.model_copy(update={"run": parent.status.run.model_copy(update={"gpu_seconds": 7200.0})})
    rich = finetune(used.model_dump(by_alias=True), output=MERGED, budget={"maxGpuHours": 1})
    made = seen(rich, [*jobs, export], [running(export)])
    assert made.status.phase == "Exporting"


def test_suspending_stops_the_export_and_resuming_makes_it() -> None:
    parent, jobs, export = exporting()
    asked = finetune(parent.status.model_dump(by_alias=True), output=MERGED, suspend=True)
    stopped = seen(asked, [*jobs, export], [running(export)])
    assert [job["metadata"]["name"] for job in stopped.delete] == ["bot-export-01234567-1"]
    idle = seen(with_status(asked, stopped), jobs)
    made = seen(with_status(asked, idle).model_copy(update={"spec": parent.spec}), jobs)
    assert made.create is not None and made.create["metadata"]["name"] == "bot-export-01234567-2"


def test_a_waiting_export_says_what_it_waits_for() -> None:
    parent, jobs, export = exporting()
    unscheduled = pod(
        export,
        phase="Pending",
        conditions=[{"type": "PodScheduled", "status": "False", "message": "0/1 nodes: Insufficient memory"}],
    )
    made = seen(parent, [*jobs, export], [unscheduled])
    assert (made.status.phase, made.status.reason) == ("Exporting", "Unschedulable")
