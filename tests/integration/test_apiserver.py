"""The API server of the tests is a real one: tokens, access rules, and no process left behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from .apiserver import ApiError, Client

ROOT = Path(__file__).resolve().parents[2]


def account(kube: Client, namespace: str) -> Client:
    """A client with the rights of a fresh ServiceAccount: none."""
    obj = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "robot", "namespace": namespace}}
    kube.create(obj)
    return Client(kube.server, kube.ca_file, token(kube, namespace))


def token(kube: Client, namespace: str, *audiences: str) -> str:
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": list(audiences)}}
    answer = kube.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/robot/token", request)
    return str(answer["status"]["token"])


def test_tokens_are_bound_to_their_audience(kube: Client, namespace: str) -> None:
    account(kube, namespace)
    narrow = token(kube, namespace, "finetune-operator")

    def review(*audiences: str) -> dict[str, object]:
        asked = {"token": narrow, "audiences": list(audiences)}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": asked}
        return dict(kube.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body)["status"])

    assert review("finetune-operator")["authenticated"] is True
    assert not review("somebody-else").get("authenticated")


def test_an_account_without_a_role_may_nothing(kube: Client, namespace: str) -> None:
    robot = account(kube, namespace)
    with pytest.raises(ApiError, match="403"):
        robot.get(f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunes")


START_AND_WAIT = """
import pathlib, sys, time
from tests.integration.apiserver import ApiServer
server = ApiServer(pathlib.Path(sys.argv[1]))
server.start()
print(*[process.pid for process in server.processes.values()], flush=True)
time.sleep(60)
"""


def test_a_killed_test_run_leaves_no_process_behind(tmp_path: Path) -> None:
    runner = subprocess.Popen(
        [sys.executable, "-c", START_AND_WAIT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert runner.stdout is not None
    pids = [int(pid) for pid in runner.stdout.readline().split()]
    assert len(pids) == 2
    runner.kill()
    runner.wait()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if running(pid)]}"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
