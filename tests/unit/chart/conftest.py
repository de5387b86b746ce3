"""Renders the chart with the real Helm."""

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).resolve().parents[3] / "charts" / "finetune-operator"
Render = Callable[..., list[dict[str, Any]]]


class HelmError(Exception):
    """Helm refused the chart or the values; the message is what it printed."""


@pytest.fixture(scope="session")
def helm() -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune-operator" / "bin" / "helm"
    found = str(cache) if cache.exists() else shutil.which("helm")
    if found is None:
        pytest.skip(f"no Helm: neither {cache} (make tools) nor one on PATH")
    return found


@pytest.fixture(scope="session")
def lint(helm: str) -> Callable[[], None]:
    def run() -> None:
        done = subprocess.run(
            [helm, "lint", "--strict", str(CHART)], capture_output=True, check=False, text=True, timeout=60
        )
        if done.returncode != 0:
            raise HelmError(done.stdout + done.stderr)

    return run


@pytest.fixture(scope="session")
def template(helm: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """template(values, namespace=...) -> what `helm template` prints."""

    def run(values: dict[str, Any] | None = None, namespace: str = "finetune-system") -> str:
        file = tmp_path_factory.mktemp("values") / "values.yaml"
        file.write_text(yaml.safe_dump(values or {}))
        command = [helm, "template", "finetune-operator", str(CHART), "--namespace", namespace, "--values", str(file)]
        done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)
        if done.returncode != 0:
            raise HelmError(done.stderr)
        return done.stdout

    return run


@pytest.fixture(scope="session")
def render(template: Callable[..., str]) -> Render:
    """render(values, namespace=...) -> the rendered objects."""

    rendered: dict[str, list[dict[str, Any]]] = {}

    def run(values: dict[str, Any] | None = None, namespace: str = "finetune-system") -> list[dict[str, Any]]:
        key = json.dumps([values, namespace])
        if key not in rendered:
            # libyaml: the CRDs alone are 5,000 lines.
            documents = yaml.load_all(template(values, namespace), Loader=yaml.CSafeLoader)
            rendered[key] = [document for document in documents if document]
        return copy.deepcopy(rendered[key])

    return run
