"""FineTunes with `deletionPolicy: Delete` on a real API server; the tests play Job controller and kubelet."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import kubelet
from .apiserver import ApiError, ApiServer, Client, Object
from .operator_process import (
    Operator,
    install_rights,
    service_account_kubeconfig,
    service_account_token,
    until,
)  # fmt: skip
from .test_operator_finetune import Run

FINALIZER = "finetune.dev/artifacts"


@pytest.fixture(scope="module")
def operator(kube: Client, api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    install_rights(kube)
    kubeconfig: Path = service_account_kubeconfig(api_server, tmp_path_factory.mktemp("operator-rights"))
    process = Operator(tmp_path_factory.mktemp("operator"), kubeconfig).start().wait_until_leading()
    yield process
    process.kill()


def finalizers(run: Run) -> list[str]:
    return list(run.now()["metadata"].get("finalizers") or [])


def trained(kube: Client, namespace: str, name: str = "bot", digest: str = "ab") -> Run:
    """A FineTune that has made an adapter and is to take it along."""
    # Its own seed: an object that is being prepared for the same run would keep it.
    run = Run(kube, namespace, name, deletionPolicy="Delete", training={"seed": int(digest, 16)})
    run.prepare()
    run.finish_training(*run.train(), digest="sha256:" + digest * 32)
    run.reaches("Succeeded")
    return run


def is_gone(run: Run) -> bool:
    try:
        run.now()
    except ApiError as error:
        return error.status == 404
    return False


def uris(job: Object) -> list[str]:
    found: list[str] = kubelet.run_spec(job)["uris"]
    return found


def test_the_finalizer_is_there_exactly_while_the_policy_is_delete(
    kube: Client, namespace: str, operator: Operator
) -> None:
    run = Run(kube, namespace)
    run.job("prepare")
    assert finalizers(run) == []
    run.edit(deletionPolicy="Delete")
    until(lambda: finalizers(run) == [FINALIZER], "the finalizer")
    run.edit(deletionPolicy="Retain")
    until(lambda: finalizers(run) == [], "no finalizer")
    assert len(run.jobs()) == 1, "none of it restarts anything"


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"suspend": True}},
        {"metadata": {"labels": {"team": "a"}}},
        {"metadata": {"annotations": {"note": "b"}}},
        {"spec": {"suspend": True}, "metadata": {"finalizers": [FINALIZER]}},
    ],
    ids=["spec", "labels", "annotations", "spec with a finalizer"],
)
def test_the_api_server_lets_the_operator_write_nothing_but_finalizers(
    kube: Client, namespace: str, operator: Operator, change: Object
) -> None:
    run = Run(kube, namespace)
    as_the_operator = Client(kube.server, kube.ca_file, service_account_token(kube))

    def refused() -> bool:  # a policy holds some moments after it was created
        try:
            as_the_operator.merge(run.created, change, dry_run=True)
        except ApiError as error:
            return "writes nothing of a FineTune but its finalizer" in str(error)
        return False

    until(refused, "the API server refuses it")
    as_the_operator.merge(run.created, {"metadata": {"finalizers": [FINALIZER]}}, dry_run=True)


def test_what_is_its_own_is_deleted_by_a_job_before_the_object_goes(
    kube: Client, namespace: str, operator: Operator
) -> None:
    run, other = trained(kube, namespace, digest="1a"), trained(kube, namespace, "other", digest="2b")
    kube.merge(other.created, {"status": {"history": [{"digest": "sha256:" + "1a" * 32, "runId": "0" * 16}]}}, "status")
    kube.delete(run.created)
    job = run.job("cleanup")
    assert uris(job) == [f"s3://finetune/runs/{run.run_id}"], "the other one names the adapter"
    assert not is_gone(run) and run.status["reason"] == "Deleting"
    kubelet.end_pod(kube, kubelet.start_pod(kube, job), 0, json.dumps({"objects": 3}))
    kubelet.end_job(kube, job, "Complete")
    until(lambda: is_gone(run), "the object is gone")
    until(lambda: "ArtifactsDeleted" in run.events(), "the Event")


def test_a_failed_clean_up_is_said_and_retain_is_the_way_out(kube: Client, namespace: str, operator: Operator) -> None:
    run = trained(kube, namespace, digest="3c")
    kube.delete(run.created)
    job = run.job("cleanup")
    failure = {"failure": {"reason": "StorageUnavailable", "message": "nobody answers at minio"}}
    kubelet.end_pod(kube, kubelet.start_pod(kube, job), 1, json.dumps(failure))
    kubelet.end_job(kube, job, "Failed")
    message = until(lambda: run.status.get("reason") == "CleanupFailed" and run.status["message"], "the failure")
    assert "nobody answers at minio" in message and "set spec.deletionPolicy: Retain" in message
    until(lambda: "CleanupFailed" in run.events(), "the Event")
    run.edit(deletionPolicy="Retain")
    until(lambda: is_gone(run), "the object is gone")


def test_a_namespace_that_is_being_deleted_is_not_held(kube: Client, namespace: str, operator: Operator) -> None:
    run = trained(kube, namespace, digest="4d")
    # No Job can be created from here on. The test plays the namespace controller: it deletes what is in it.
    kube.delete({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    for job in run.jobs():
        kube.delete(job)
    kube.delete(run.created)
    until(lambda: is_gone(run), "the object is gone")

    def line() -> bool:
        lines = [json.loads(text) for text in operator.log.read_text().splitlines()]
        return any("the namespace is being deleted; in the bucket stay" in found["message"] for found in lines)

    until(line, "a line that says what stays")
