"""Fixtures of the integration tests: a real API server with our CRDs installed.

api_server   one ApiServer per test session; `api_server.kubeconfig` is the path of an admin's kubeconfig
kube         a raw-JSON client with an admin's rights, the CRDs being established
kubeconfig   the path of that kubeconfig, for programs and client libraries
namespace    the name of a namespace of the test's own
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .apiserver import ApiError, ApiServer, Client, Object, missing_programs
from .crd_cases import crds, crds_with_everything

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    if missing := missing_programs():
        pytest.fail(f"the integration tests need {', '.join(missing)}")
    server = ApiServer(tmp_path_factory.mktemp("apiserver"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def kube(api_server: ApiServer) -> Client:
    client = api_server.client
    install(client, *crds(), *crds_with_everything())
    return client


@pytest.fixture(scope="session")
def kubeconfig(api_server: ApiServer, kube: Client) -> Path:
    return api_server.kubeconfig


@pytest.fixture
def namespace(kube: Client) -> str:
    name = f"test-{next(_numbers)}"
    kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


def install(client: Client, *crds: Object) -> None:
    """Creates CRDs and returns when objects of their kinds can be written."""
    for crd in crds:
        client.create(crd)
    deadline = time.monotonic() + 20
    for crd in crds:
        while not _served(client, crd):
            assert time.monotonic() < deadline, f"{crd['metadata']['name']} is not served"
            time.sleep(0.02)


def _served(client: Client, crd: Object) -> bool:
    now = client.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}")
    conditions = {condition["type"]: condition for condition in now.get("status", {}).get("conditions") or []}
    assert "NonStructuralSchema" not in conditions, conditions["NonStructuralSchema"]["message"]
    if conditions.get("Established", {}).get("status") != "True":
        return False
    try:
        version = crd["spec"]["versions"][0]["name"]
        client.get(f"/apis/{crd['spec']['group']}/{version}/{crd['spec']['names']['plural']}", limit="1")
        return True
    except ApiError:
        return False
