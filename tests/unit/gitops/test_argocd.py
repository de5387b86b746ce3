"""The Argo CD folder: health scripts run under Lua 5.1 as Argo CD runs them, and Applications that point at what exists."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from lupa import lua51

from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.api.adapterdeploymentstatus import AdapterDeploymentPhase
from finetune_operator.api.finetune import FineTune
from finetune_operator.api.finetunestatus import FineTunePhase

REPOSITORY = Path(__file__).resolve().parents[3]
ARGOCD = REPOSITORY / "gitops" / "argocd"
CUSTOMIZATIONS = ARGOCD / "resource_customizations" / "finetune.dev"
KINDS: dict[str, Any] = {"FineTune": FineTune, "AdapterDeployment": AdapterDeployment}
PHASES = {"FineTune": get_args(FineTunePhase), "AdapterDeployment": get_args(AdapterDeploymentPhase)}


def health(kind: str, document: dict[str, Any]) -> dict[str, str]:
    """The answer of the kind's health.lua, with no more of Lua's library than Argo CD's sandbox has."""
    lua = lua51.LuaRuntime(unpack_returned_tuples=True, register_eval=False)
    for closed in ("os", "io", "debug", "package", "require", "dofile", "loadfile", "string", "math", "python"):
        lua.globals()[closed] = None
    lua.globals()["obj"] = lua.table_from(document, recursive=True)
    return dict(lua.execute((CUSTOMIZATIONS / kind / "health.lua").read_text()))


def cases() -> list[Any]:
    return [
        pytest.param(kind, case, id=f"{kind}-{Path(case['inputPath']).stem}")
        for kind in KINDS
        for case in yaml.safe_load((CUSTOMIZATIONS / kind / "health_test.yaml").read_text())["tests"]
    ]


@pytest.mark.parametrize(("kind", "case"), cases())
def test_health_is_what_its_test_file_says(kind: str, case: dict[str, Any]) -> None:
    document = yaml.safe_load((CUSTOMIZATIONS / kind / case["inputPath"]).read_text())
    KINDS[kind].model_validate(document)
    assert health(kind, document) == case["healthStatus"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_phase_and_every_test_file_has_a_case(kind: str) -> None:
    folder = CUSTOMIZATIONS / kind
    tests = yaml.safe_load((folder / "health_test.yaml").read_text())["tests"]
    assert {case["inputPath"] for case in tests} == {f"testdata/{p.name}" for p in (folder / "testdata").iterdir()}
    documents = [yaml.safe_load((folder / case["inputPath"]).read_text()) for case in tests]
    phases = {document.get("status", {}).get("phase") for document in documents}
    assert set(PHASES[kind]) - phases <= {"Exporting"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_phase_is_healthy_before_the_operator_has_seen_the_spec(kind: str) -> None:
    for phase in PHASES[kind]:
        document = {"metadata": {"generation": 2}, "spec": {}, "status": {"phase": phase, "observedGeneration": 1}}
        assert health(kind, document)["status"] == "Progressing"


def test_the_config_map_carries_the_same_scripts() -> None:
    data = yaml.safe_load((ARGOCD / "argocd-cm.yaml").read_text())["data"]
    expected = {
        f"resource.customizations.health.finetune.dev_{kind}": (CUSTOMIZATIONS / kind / "health.lua").read_text()
        for kind in KINDS
    }
    assert data == expected


def applications() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in sorted((ARGOCD / "applications").glob("*.yaml"))]


def test_applications_point_at_folders_that_exist() -> None:
    found = {a["metadata"]["name"]: REPOSITORY / a["spec"]["source"]["path"] for a in applications()}
    assert (found["finetune-operator"] / "Chart.yaml").exists()
    kinds = [yaml.safe_load(path.read_text())["kind"] for path in sorted(found["support-bot"].iterdir())]
    assert kinds == ["AdapterDeployment", "FineTune"]


def test_the_operator_is_synced_before_the_objects_that_need_it() -> None:
    waves = {
        a["metadata"]["name"]: int(a["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"]) for a in applications()
    }
    assert waves["finetune-operator"] < waves["support-bot"]
    assert all("ServerSideApply=true" in a["spec"]["syncPolicy"]["syncOptions"] for a in applications())


def test_the_folder_holds_the_examples() -> None:
    for name in ("finetune.yaml", "adapterdeployment.yaml"):
        copy, example = ARGOCD / "apps" / "support-bot" / name, REPOSITORY / "examples" / name
        assert yaml.safe_load(copy.read_text()) == yaml.safe_load(example.read_text())


def test_the_application_may_set_only_values_that_the_chart_has() -> None:
    def unknown(path: str, given: Any, defaults: Any) -> list[str]:
        if not isinstance(given, dict):
            return []
        missing = [f"{path}.{key}" for key in given if key not in defaults]
        return missing + [
            m for key in given.keys() & defaults.keys() for m in unknown(f"{path}.{key}", given[key], defaults[key])
        ]

    chart = yaml.safe_load((REPOSITORY / "charts" / "finetune-operator" / "values.yaml").read_text())
    values = next(a for a in applications() if a["metadata"]["name"] == "finetune-operator")["spec"]["source"]["helm"]
    assert unknown("", values["valuesObject"], chart) == []
