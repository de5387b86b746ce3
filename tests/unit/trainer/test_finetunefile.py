"""FineTune files as people have them: YAML, JSON, lists, standard input; and what is wrong with the others."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_trainer.command import finetunefile
from finetune_trainer.command.finetunefile import BadFile, read_finetune

TUNE: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTune", "metadata": {"name": "a"},
    "spec": {"baseModel": {"s3": {"uri": "s3://models/a"}}, "dataset": {"train": {"s3": {"uri": "s3://data/a"}}}},
}  # fmt: skip
LIVE = {
    **TUNE,
    "metadata": {"name": "a", "uid": "1", "resourceVersion": "2", "generation": 1, "managedFields": []},
    "status": {"phase": "Succeeded"},
}
TEXTS = {
    "yaml": yaml.safe_dump(TUNE),
    "among others": yaml.safe_dump_all([None, {"kind": "ConfigMap", "metadata": {"name": "x"}}, TUNE]),
    "json": json.dumps(TUNE),
    "json with tabs": json.dumps(TUNE, indent="\t"),
    "kubectl get -o yaml": yaml.safe_dump(LIVE),
    "kubectl get finetunes -o json": json.dumps({"apiVersion": "v1", "kind": "List", "items": [LIVE]}),
    "anchors": "x: &x {name: a}\n---\n" + yaml.safe_dump({**TUNE, "metadata": {"name": "a", "labels": {}}}),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_finetune_is_read_as_people_have_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert read_finetune(tmp_path / "a.yaml").metadata.name == "a"


def test_a_finetune_is_read_from_standard_input_as_often_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    finetunefile._stdin.cache_clear()
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXTS["yaml"]))
    assert read_finetune(Path("-")) == read_finetune(Path("-"))
    finetunefile._stdin.cache_clear()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXTS["yaml"] + "kind: FineTune\n", r"a.yaml:\d+:1: no YAML: kind is there twice"),
        (TEXTS["yaml"].replace("FineTune", "Finetune"), "holds 0 FineTunes: one is needed .*; it holds Finetune$"),
        (TEXTS["yaml"] + "---\n" + TEXTS["yaml"], "holds 2 FineTunes: one is needed"),
        ("", "holds 0 FineTunes: one is needed"),
        ("- a\n", "holds 0 FineTunes: one is needed"),
        ("a:\n\tb: 1\n", "a.yaml:2:1: no YAML: found character"),
        (json.dumps({**TUNE, "metadata": "a"}), "metadata: Input should be a valid dictionary"),
        (json.dumps({**TUNE, "apiVersion": "finetune.dev/v1"}), "apiVersion: Input should be 'finetune.dev/v1alpha1'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(BadFile, match=message):
        read_finetune(tmp_path / "a.yaml")


def test_a_field_that_an_anchor_brings_may_be_written_again(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: &x {name: b}\ny: &y {labels: {}}\nz: {<<: *x, <<: *y, name: a}\n")
    (found,) = finetunefile.documents(tmp_path / "a.yaml")
    assert found["z"] == {"labels": {}, "name": "a"}
