"""The API's rules on this machine say what the real API server says: the same cases, the same fields and messages."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_operator.api.finetune import FineTune
from finetune_trainer.command import apirules
from finetune_trainer.command.cli import main
from tests.integration.crd_cases import Case, changed
from tests.integration.test_crd_finetune import (
    ALLOWED_URLS,
    CASES,
    FORBIDDEN_URL,
    FORBIDDEN_URLS,
    MINIMAL,
    url,
)


def broken(changes: dict[str, Any], **options: Any) -> list[str] | None:
    return apirules.broken(FineTune.model_validate(changed(MINIMAL, changes)), **options)


# A schema cannot bound the keys of a map, so the CRD has rules for them; the types do it themselves.
OF_THE_TYPES = "a key must look like app or example.com/app"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_broken_rule_has_the_api_servers_field_and_message(case: Case) -> None:
    if case.message.endswith(OF_THE_TYPES):
        with pytest.raises(ValidationError, match="String should match pattern"):
            broken(case.bad)
        return
    at = "" if case.message.startswith("metadata.name") else f"{case.at}: "
    assert f"{at}{case.message}" in (broken(case.bad, refused=[]) or [])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_api_server_accepts_breaks_no_rule(case: Case) -> None:
    assert broken(case.good, refused=[]) == []


@pytest.mark.parametrize("address", [*FORBIDDEN_URLS, *ALLOWED_URLS])
def test_urls_are_judged_alike(address: str) -> None:
    expected = [f"{FORBIDDEN_URL.at}: {FORBIDDEN_URL.message}"] if address in FORBIDDEN_URLS else []
    assert broken(url(address)) == expected


def test_a_file_that_breaks_rules_is_refused_with_all_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(
        "kind: FineTune\nmetadata: {name: a.b}\nspec: {baseModel: {}, dataset: {train: {}}}\n"
    )
    assert main(["estimate", str(tmp_path / "a.yaml")]) == 1
    told = capsys.readouterr().err
    assert "spec.baseModel: give exactly one of huggingFace, s3 and persistentVolumeClaim" in told
    assert "spec.dataset.train: give exactly one of" in told
    assert "metadata.name: at most 40 characters" in told


def test_without_the_runtime_that_is_said(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cel_expr_python'] = None\n"
        "from finetune_trainer.command.finetunefile import checked\n"
        "checked({'kind': 'FineTune', 'metadata': {'name': 'a'}, 'spec': {'baseModel': {}, 'dataset': {'train': {}}}}, 'a')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == f"{apirules.MISSING}\n"
