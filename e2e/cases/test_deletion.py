"""A FineTune with `deletionPolicy: Delete` takes its artifacts along, and nothing that is not its own."""

from __future__ import annotations

from e2e.cases.conftest import Apply, make_namespace
from e2e.cases.objects import finetune
from e2e.kubectl import Kubectl
from e2e.storage import open_storage


def test_its_own_run_goes_and_the_adapter_that_another_one_names_stays(
    namespace: str, kubectl: Kubectl, apply: Apply, seed: int
) -> None:
    """Two objects with one run, deleted one after the other: the first leaves all of it to the second."""
    tune = apply(finetune("first", namespace, seed, deletionPolicy="Delete"))
    status = tune.wait_true("Complete")["status"]
    adapter, dataset, run = status["adapter"]["uri"], status["dataset"]["uri"], status["run"]["id"]
    folder = f"{adapter.rpartition('/adapters/')[0]}/runs/{run}"
    second = apply(finetune("second", namespace, seed, deletionPolicy="Delete"))
    assert second.wait_true("Complete")["status"]["reason"] == "ReusedExisting"

    tune.delete()
    kubectl.wait_gone("finetune/first", "-n", namespace, timeout=180)
    with open_storage(kubectl) as storage:

        def objects(uri: str) -> int:
            name, _, key = uri.removeprefix("s3://").partition("/")
            return sum(1 for _ in storage.list_objects(name, prefix=f"{key}/", recursive=True))

        assert objects(adapter) and objects(folder), "the second one names them"
        second.delete()
        kubectl.wait_gone("finetune/second", "-n", namespace, timeout=180)
        assert (objects(adapter), objects(folder)) == (0, 0)
        assert objects(dataset), "datasets are shared by digest"
    told = kubectl.items("events.events.k8s.io", "-n", namespace)
    assert {"ArtifactsDeleted"} <= {event["reason"] for event in told}


def test_a_namespace_with_such_an_object_is_deleted(kubectl: Kubectl, apply: Apply, seed: int) -> None:
    namespace = make_namespace(kubectl, f"e2e-deleted-{seed:08x}")
    tune = apply(finetune("kept", namespace, seed, deletionPolicy="Delete"))
    tune.wait_true("Complete")
    assert tune.get()["metadata"]["finalizers"] == ["finetune.dev/artifacts"]
    kubectl.run("delete", "namespace", namespace, "--wait=false")
    kubectl.wait_gone(f"namespace/{namespace}", timeout=180)
