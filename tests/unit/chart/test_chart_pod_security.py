"""No pod of the chart needs more than Pod Security `restricted`, and none writes to its root file system."""

from collections.abc import Callable
from typing import Any

import pytest

from .test_chart_render import VALUE_SETS


def pods(documents: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (d["metadata"]["name"], d["spec"]["template"]["spec"]) for d in documents if d["kind"] in ("Deployment", "Job")
    ]


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_pods_pass_the_restricted_profile(render: Callable[..., list[dict[str, Any]]], values: Any) -> None:
    found = pods(render(values))
    assert found
    for name, pod in found:
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] >= 10000, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert all({"configMap", "emptyDir", "secret", "persistentVolumeClaim"} & v.keys() for v in pod["volumes"]), (
            name
        )
        for container in pod["containers"] + pod.get("initContainers", []):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["readOnlyRootFilesystem"] is True
            assert container["resources"]["requests"] and "memory" in container["resources"]["limits"]


def test_only_the_operator_gets_an_api_token(render: Callable[..., list[dict[str, Any]]]) -> None:
    tokens = {
        name: pod.get("automountServiceAccountToken", True) for name, pod in pods(render({"minio": {"enabled": True}}))
    }
    assert tokens == {"finetune-operator": True, "minio": False}
