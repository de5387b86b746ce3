"""What is deleted with a FineTune, and that every way ends with its finalizer gone."""

from typing import Any

import pytest

from finetune_operator import labels
from finetune_operator.api.finetune import FineTune
from finetune_operator.finetune import deletion
from finetune_operator.finetune.deletion import Step
from finetune_operator.finetune.ownership import FINALIZER, Artifacts, artifacts
from finetune_trainer.cleanupspec import CleanupSpec

from .stations import in_training, succeeded
from .wrappers import DIGEST, NOW, SETTINGS, Object, ended, finetune, later, pod, running, stored, terminated

RUN, OLD_RUN = "0123456789abcdef", "fedcba9876543210"
OLD = "sha256:" + "cd" * 32


def at(digest: str, root: str = "s3://finetune") -> str:
    return f"{root}/adapters/{digest[7:]}"


def made(digest: str = DIGEST, run_id: str = RUN, root: str = "s3://finetune") -> Object:
    return {"uri": at(digest, root), "digest": digest, "runId": run_id}


def with_artifacts(**status: Any) -> FineTune:
    return finetune({"run": {"id": RUN, "inputs": "1" * 16}, "adapter": made(), **status}, deletionPolicy="Delete")


def other(name: str = "other", deleted: bool = False, finalizers: Any = (), **status: Any) -> Object:
    meta = {"name": name, "namespace": "demo", "uid": f"uid-{name}", "finalizers": list(finalizers)}
    return {"metadata": {**meta, **({"deletionTimestamp": "x"} if deleted else {})}, "spec": {}, "status": status}


def deployment(*adapters: Object, deleted: bool = False, **status: Any) -> Object:
    return {**other("served", deleted, **status), "spec": {"adapters": list(adapters)}}


BOTH = ("s3://finetune/runs/" + RUN, at(DIGEST))


# ---- what is its own -------------------------------------------------------------------------------------------------


def test_runs_adapters_and_exports_are_its_own_and_mirrors_and_datasets_are_not() -> None:
    exports = [
        {"type": "Merged", "uri": "s3://finetune/merged/" + "e" * 64, "digest": "sha256:" + "e" * 64},
        {"type": "Hub", "uri": "https://hub/acme/bot", "digest": ""},
    ]
    known = {
        "history": [{**made(), "result": "Succeeded"}, {**made(OLD, OLD_RUN, "s3://elsewhere/x"), "result": "Failed"}],
        "baseModel": {"uri": "s3://finetune/models/" + "f" * 64, "digest": "sha256:" + "f" * 64},
        "dataset": {"uri": "s3://finetune/datasets/" + "d" * 64, "digest": "sha256:" + "d" * 64},
        "exports": exports,
    }
    own = artifacts(with_artifacts(**known), "s3://finetune/", [], [])
    elsewhere = ("s3://elsewhere/x/runs/" + OLD_RUN, at(OLD, "s3://elsewhere/x"))
    assert own == Artifacts((*BOTH, *elsewhere, "s3://finetune/merged/" + "e" * 64))


def test_an_adapter_whose_address_is_not_its_digest_is_left_alone() -> None:
    adapter = {**made(), "uri": "s3://finetune/adapters/somewhere"}
    assert artifacts(with_artifacts(adapter=adapter), "s3://finetune", [], []).delete == BOTH[:1]


@pytest.mark.parametrize(
    "finetunes, deployments, kept",
    [
        ([other(run={"id": RUN})], [], {BOTH[0]}),
        ([other(adapter=made())], [], set(BOTH)),
        ([other(history=[{**made(), "result": "Succeeded"}])], [], set(BOTH)),
        ([other(run={"inputs": "1" * 16})], [], set(BOTH)),
        ([other(run={"inputs": "2" * 16})], [], set()),
        ([other(deleted=True, adapter=made())], [], set(BOTH)),
        ([other(deleted=True, finalizers=[FINALIZER], adapter=made())], [], set()),
        ([], [deployment({"name": "a", "artifact": {"digest": DIGEST}})], {BOTH[1]}),
        ([], [deployment({"name": "a", "fineTuneRef": {"name": "bot"}})], {BOTH[1]}),
        ([], [deployment(adapters=[{"servedDigest": DIGEST}])], {BOTH[1]}),
        ([], [deployment(deleted=True, adapters=[{"servedDigest": DIGEST}])], set()),
    ],
)
def test_what_another_object_names_stays_and_who_that_is_is_said(finetunes: Any, deployments: Any, kept: Any) -> None:
    parent = with_artifacts()
    own = artifacts(parent, "s3://finetune", finetunes, deployments)
    assert {text.partition(" ")[0] for text in own.kept} == kept
    assert set(own.delete) == set(BOTH) - kept
    assert all("demo/" in text and "names it" in text for text in own.kept)


# ---- step by step ----------------------------------------------------------------------------------------------------

OWN = Artifacts(BOTH)


def deleted(parent: FineTune, **spec: Any) -> FineTune:
    meta = parent.metadata.model_copy(update={"deletion_timestamp": "2026-11-22T12:00:00Z"})
    policy = parent.spec.model_copy(update={"deletion_policy": "Delete", **spec})
    return parent.model_copy(update={"metadata": meta, "spec": policy})


def look(parent: FineTune, *jobs: Object, pods: Any = (), after: float = 0, own: Artifacts = OWN) -> Step:
    return deletion.step(parent, own, jobs, pods, SETTINGS, later(after))


def test_the_runs_pods_end_before_anything_is_deleted() -> None:
    parent, prepare, train = in_training()
    parent, pods = deleted(parent), [running(train)]
    first = look(parent, prepare, train, pods=pods)
    assert set(map(str, first.delete)) == {str(prepare), str(train)} and first.create is None
    saving = look(parent, pods=pods)
    assert saving.create is None and saving.again is not None and "pods have ended" in saving.message
    assert look(parent).create is not None


def test_the_job_gets_the_folders_and_the_credentials_and_no_owner() -> None:
    parent, _ = succeeded(queueName="team-a", output={"s3": {"credentialsSecretRef": {"name": "mine"}}})
    job = look(deleted(parent)).create
    assert job is not None
    template = job["spec"]["template"]
    spec = CleanupSpec.model_validate_json(template["metadata"]["annotations"][labels.RUN_SPEC])
    assert tuple(spec.uris) == BOTH and spec.storage.uri == "s3://finetune"
    assert "ownerReferences" not in job["metadata"] and labels.KUEUE_QUEUE not in job["metadata"]["labels"]
    container = template["spec"]["containers"][0]
    secrets = {v["valueFrom"]["secretKeyRef"]["name"] for v in container["env"] if "valueFrom" in v}
    assert secrets == {"mine"} and container["args"][0] == "cleanup"
    assert template["spec"]["automountServiceAccountToken"] is False and job["spec"]["activeDeadlineSeconds"] > 0


def tried(parent: FineTune) -> Object:
    return stored(look(parent).create, uid="uid-cleanup")


def test_when_the_job_is_done_the_object_may_go() -> None:
    parent = deleted(succeeded()[0])
    job = tried(parent)
    waiting = look(parent, job, pods=[running(job)])
    assert not waiting.release and waiting.create is None and "set spec.deletionPolicy: Retain" in waiting.message
    last = pod(job)
    last["status"] = {
        "phase": "Succeeded",
        "containerStatuses": [{"name": "trainer", "state": {"terminated": {"message": '{"objects": 9}'}}}],
    }
    done = look(parent, ended(job, "Complete"), pods=[last], own=Artifacts(BOTH, ("s3://x (who)",)))
    assert done.release and done.event is not None and done.event.reason == "ArtifactsDeleted"
    assert "(9 objects); kept s3://x (who)" in done.event.note


def test_a_failed_job_is_said_and_tried_again_after_a_pause_that_grows() -> None:
    parent = deleted(succeeded()[0])
    job = tried(parent)
    words = '{"failure": {"reason": "StorageUnavailable", "message": "no answer from the store"}}'
    pods = [terminated(job, 1)]
    pods[0]["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = words
    failed = look(parent, ended(job), pods=pods, after=1)
    assert failed.event is not None and (failed.event.type, failed.reason) == ("Warning", "CleanupFailed")
    assert "no answer from the store. It is tried again for an hour; to delete the object at once" in failed.message
    told = parent.model_copy(update={"status": parent.status.model_copy(update={"message": failed.message})})
    assert look(told, ended(job), pods=pods, after=2).event is None
    second = look(parent, ended(job), pods=pods, after=31).create
    assert second is not None and second["metadata"]["name"].endswith("-2")
    both = (ended(job), ended(stored(second, uid="uid-2")))
    assert look(parent, *both, after=59).create is None and look(parent, *both, after=61).create is not None


def test_after_an_hour_the_object_goes_and_what_stays_is_said() -> None:
    parent = deleted(succeeded()[0])
    job = tried(parent)
    for state in (job, ended(job)):
        gone = look(parent, state, after=3601)
        assert gone.release and gone.delete == (state,)
        assert gone.event is not None and gone.event.type == "Warning" and BOTH[1] in gone.event.note


def test_retain_lets_the_object_go_at_once_even_while_it_is_being_deleted() -> None:
    parent = deleted(succeeded()[0])
    job = tried(parent)
    assert look(deleted(parent, deletion_policy="Retain"), job) == Step(release=True, delete=(job,))


def test_nothing_of_its_own_needs_no_job() -> None:
    step = look(deleted(finetune()), own=Artifacts((), ("s3://x (who)",)))
    assert step.release and step.create is None
    assert step.event is not None and step.event.note == "nothing in the bucket is its own; kept s3://x (who)"
    assert NOW == later(0)
