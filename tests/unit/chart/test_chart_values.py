"""values.yaml, values.schema.json and README.md say the same, and a typo is refused."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from .conftest import CHART, HelmError

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = SCHEMA["definitions"][node["$ref"].removeprefix("#/definitions/")]
    return node


def differences(path: str, values: Any, node: dict[str, Any]) -> Iterator[str]:
    properties = resolved(node).get("properties")
    if not isinstance(values, dict) or properties is None or path == ".resources" or path.endswith(".resources"):
        return
    if resolved(node).get("additionalProperties") is not False:
        yield f"{path} allows unknown keys"
    for key in values.keys() ^ (properties.keys() - {"global"}):
        yield f"{path}.{key} is in only one of values.yaml and values.schema.json"
    for key in values.keys() & properties.keys():
        yield from differences(f"{path}.{key}", values[key], properties[key])


def test_the_schema_knows_exactly_the_values_that_exist() -> None:
    assert list(differences("", VALUES, SCHEMA)) == []


def leaves(path: str, values: Any) -> Iterator[str]:
    if isinstance(values, dict) and values and not path.endswith("resources"):
        for key, value in values.items():
            yield from leaves(f"{path}.{key}".lstrip("."), value)
    else:
        yield path


def test_every_value_is_described_in_the_readme() -> None:
    readme = (CHART / "README.md").read_text()
    assert [path for path in leaves("", VALUES) if f"| `{path}` |" not in readme] == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"minoi": {"enabled": True}}, "minoi"),
        ({"minio": {"enable": True}}, "enable"),
        ({"images": {"operator": {"tags": "v1"}}}, "tags"),
        ({"images": {"trainer": {"digest": "sha256:short"}}}, "digest"),
        ({"images": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"storage": {"uri": "finetune"}}, "uri"),
        ({"storage": {"endpoint": "minio:9000"}}, "endpoint"),
        ({"replicas": 0}, "replicas"),
        ({"pretendGPUs": "yes"}, "pretendGPUs"),
        ({"pricePerGpuHour": -1}, "pricePerGpuHour"),
        ({"tracking": {"mlfow": {}}}, "mlfow"),
        ({"logLevel": "loud"}, "logLevel"),
        ({"engine": {"env": {"VLLM_CPU_KVCACHE_SPACE": 1}}}, "VLLM_CPU_KVCACHE_SPACE"),
        ({"watchNamespaces": "team-a"}, "watchNamespaces"),
        ({"prepare": {"memory": "lots"}}, "memory"),
    ],
)
def test_a_wrong_value_is_refused_by_name(template: Callable[..., str], values: dict[str, Any], said: str) -> None:
    with pytest.raises(HelmError, match=said):
        template(values)


def test_a_parent_chart_may_pass_globals(template: Callable[..., str]) -> None:
    template({"global": {"anything": 1}})
