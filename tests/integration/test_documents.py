"""The real API server takes what examples/ and the documentation show, and every object of the chart."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from .apiserver import BINARIES, ApiError, Client, Object

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown() -> list[Any]:
    """Every object in examples/, gitops/ and the pages' YAML that says its kind and is of Kubernetes or ours."""
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "examples").rglob("*.yaml"))}
    for page in PAGES:
        found = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        texts |= {f"{page.name} {number}": block for number, block in enumerate(found, start=1)}
    return [
        pytest.param(document, id=f"{where} {document['kind']}")
        for where, text in texts.items()
        for document in yaml.safe_load_all(text)
        if isinstance(document, dict) and document.get("apiVersion") in ("v1", "finetune.dev/v1alpha1")
    ]


@pytest.fixture(scope="module")
def cluster(kube: Client) -> Client:
    """With the namespaces that documents and chart name."""
    for name in ("demo", "finetune-system", "team-a"):
        try:
            kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
    return kube


@pytest.mark.parametrize("document", shown())
def test_what_is_shown_works_by_copy_and_paste(cluster: Client, document: Object) -> None:
    cluster.create(document, dry_run=True)


@pytest.mark.parametrize(
    "values",
    [
        {"minio": {"enabled": True}, "networkPolicy": {"enabled": True}},
        {"watchNamespaces": ["team-a"], "replicas": 3, "minio": {"enabled": True, "persistence": {"enabled": False}}},
    ],
    ids=["cluster", "namespaced"],
)
def test_the_charts_objects_are_accepted(cluster: Client, values: dict[str, Any], tmp_path: Path) -> None:
    helm = str(BINARIES / "helm") if os.access(BINARIES / "helm", os.X_OK) else shutil.which("helm")
    assert helm, f"no Helm: neither {BINARIES / 'helm'} nor one on PATH"
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values | {"crds": {"enabled": False}}))
    chart = str(ROOT / "charts" / "finetune-operator")
    command = [
        helm,
        "template",
        "finetune-operator",
        chart,
        "-n",
        "finetune-system",
        "-f",
        str(tmp_path / "values.yaml"),
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    documents = [document for document in yaml.safe_load_all(text) if document]
    assert len(documents) > 10
    for document in documents:
        cluster.create(document, dry_run=True)
