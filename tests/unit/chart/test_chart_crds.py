"""The chart's CRDs are the repository's."""

from pathlib import Path

from .conftest import CHART

CRDS = Path(__file__).resolve().parents[3] / "crds"


def test_the_chart_carries_the_same_crds_as_the_repository() -> None:
    copies = {path.name: path.read_text() for path in (CHART / "files" / "crds").glob("*.yaml")}
    assert copies == {path.name: path.read_text() for path in CRDS.glob("*.yaml")}, "run `make generate`"
    assert len(copies) == 2
