"""Several operators, one that dies, and one that is restarted in the middle of a run."""

import time
from pathlib import Path

import pytest

from .apiserver import ApiServer, Client
from .operator_process import Operator, install_rights, service_account_kubeconfig, until
from .test_operator_finetune import Run

LEASE = "/apis/coordination.k8s.io/v1/namespaces/finetune-system/leases/finetune-operator"


@pytest.fixture(scope="module")
def rights(kube: Client, api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    install_rights(kube)
    return service_account_kubeconfig(api_server, tmp_path_factory.mktemp("rights"))


def test_a_run_goes_on_when_the_operator_is_restarted_in_the_middle(
    kube: Client, namespace: str, rights: Path, tmp_path: Path
) -> None:
    first = Operator(tmp_path / "first", rights).start().wait_until_leading()
    try:
        run = Run(kube, namespace)
        run.prepare()
        job, pod = run.train()
        run.reaches("Training")
        assert first.terminate() < 15
        assert kube.get(LEASE)["spec"]["holderIdentity"] == "", "the next leader need not wait"
        # The run ends while nobody watches.
        run.finish_training(job, pod)
    finally:
        first.kill()
    second = Operator(tmp_path / "second", rights).start().wait_until_leading()
    try:
        assert run.reaches("Succeeded")["adapter"]["runId"] == run.run_id
        assert len(run.jobs("train")) == 1
    finally:
        second.terminate()
        second.kill()


def test_when_the_leader_is_killed_the_follower_takes_over_within_20_seconds(
    kube: Client, namespace: str, rights: Path, tmp_path: Path
) -> None:
    replicas = [Operator(tmp_path / pod, rights, pod).start() for pod in ("replica-a", "replica-b")]
    try:
        until(lambda: all(r.ready() for r in replicas), "both replicas are ready", 60)
        until(lambda: any(r.leading() for r in replicas), "one leads", 60)
        assert sum(r.leading() for r in replicas) == 1
        leader, follower = sorted(replicas, key=lambda r: not r.leading())
        assert follower.ready() == "standing by\n"
        holder = kube.get(LEASE)["spec"]["holderIdentity"]
        leader.kill()
        killed = time.monotonic()
        run = Run(kube, namespace)
        until(lambda: run.jobs("prepare"), "the follower creates the Job", 20)
        assert time.monotonic() - killed < 20
        assert kube.get(LEASE)["spec"]["holderIdentity"] != holder
    finally:
        for replica in replicas:
            replica.kill()
        # Nobody waits for a lease of a dead process in the next test.
        kube.request("DELETE", LEASE)


def test_a_leader_whose_lease_is_taken_leaves_at_once(
    kube: Client, namespace: str, rights: Path, tmp_path: Path
) -> None:
    replica = Operator(tmp_path / "robbed", rights).start().wait_until_leading()
    try:
        kube.request("PATCH", LEASE, {"spec": {"holderIdentity": "somebody-else"}}, "application/merge-patch+json")
        began = time.monotonic()
        assert replica.wait() == 1
        assert time.monotonic() - began < 6
        assert kube.get(LEASE)["spec"]["holderIdentity"] == "somebody-else"
    finally:
        replica.kill()
        kube.request("DELETE", LEASE)


def test_every_mistake_in_the_settings_is_named_and_the_operator_leaves(tmp_path: Path, rights: Path) -> None:
    bad = Operator(tmp_path / "bad", rights, workers=0, colour="blue").start()
    assert bad.wait() == 2
    text = bad.log.read_text()
    assert "workers: Input should be greater than or equal to 1" in text
    assert "colour: Extra inputs are not permitted" in text
