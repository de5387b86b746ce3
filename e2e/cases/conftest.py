"""Each test has a namespace of its own on the cluster, that admits restricted pods only."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator, Iterator

import pytest

from e2e.cases.handles import Handle
from e2e.cases.objects import ROWS, config_map, small_dataset
from e2e.cluster.layout import SYSTEM_NAMESPACE
from e2e.demo.base_model import base_model
from e2e.demo.namespace import prepare_namespace
from e2e.kubectl import Kubectl, Object
from e2e.storage import open_storage, upload_folder

Apply = Callable[[Object], Handle]


@pytest.fixture(scope="session")
def kubectl() -> Kubectl:
    kubectl = Kubectl()
    kubectl.run(
        "rollout", "status", "deployment/finetune-operator", "-n", SYSTEM_NAMESPACE, "--timeout=180s", timeout=200
    )
    return kubectl


@pytest.fixture(scope="session", autouse=True)
def model_in_the_bucket(kubectl: Kubectl) -> None:
    folder = base_model()
    with open_storage(kubectl) as storage:
        upload_folder(storage, folder, "models", "tiny-llama")


@pytest.fixture
def seed() -> int:
    """Makes the test's runs its own: no adapter of an earlier session can be reused."""
    return random.SystemRandom().randrange(2**31)


def make_namespace(kubectl: Kubectl, name: str) -> str:
    prepare_namespace(kubectl, name)
    kubectl.apply(config_map(ROWS, name, {"train.jsonl": small_dataset()}))
    return name


@pytest.fixture
def namespace(kubectl: Kubectl, request: pytest.FixtureRequest) -> Iterator[str]:
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:40].strip("-")
    name = make_namespace(kubectl, f"e2e-{words}-{random.randrange(16**4):04x}")
    print(f"\n  namespace {name}", flush=True)
    yield name
    kubectl.run("delete", "namespace", name, "--wait=false")


@pytest.fixture
def apply(kubectl: Kubectl, request: pytest.FixtureRequest) -> Apply:
    """Apply an object and get its handle; all handles are explained when the test fails."""
    handles: list[Handle] = request.node.stash.setdefault(HANDLES, [])

    def applied(resource: Object) -> Handle:
        kubectl.apply(resource)
        metadata = resource["metadata"]
        handle = Handle(kubectl, resource["kind"].lower(), metadata["name"], metadata["namespace"])
        handles.append(handle)
        return handle

    return applied


HANDLES = pytest.StashKey[list[Handle]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        for handle in item.stash.get(HANDLES, []):
            report.sections.append((str(handle), handle.explain()))
    return report
