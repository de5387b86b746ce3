"""The converter from types to CRDs, and what it made."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from pydantic import Field, create_model

from finetune_operator import crdgen
from finetune_operator.api.common import Duration, Quantity, Spec
from finetune_operator.api.rules import Rule
from finetune_operator.api.unsupported import NOT_SUPPORTED_YET
from finetune_operator.crdgen import KINDS, Kind, NotStructural, Schema


def converted(annotation: Any, **field: Any) -> Schema:
    """The schema of one field of that type."""
    model: type[Spec] = create_model("Part", __base__=Spec, field=(annotation, Field(**field)))
    source = model.model_json_schema(by_alias=True)
    schema = crdgen.convert(source, source.get("$defs", {}), "spec")
    part: Schema = schema["properties"]["field"]
    return part | {"required": "field" in schema.get("required", [])}


class Child(Spec):
    rules = (Rule("self.count > 1", "count: too few; use 2", field="count"),)

    count: int = Field(default=3, ge=1, le=9, description="How many.")


def test_a_field_without_default_is_required() -> None:
    assert converted(bool)["required"]
    assert not converted(bool, default=True)["required"]


def test_an_optional_field_has_neither_null_nor_a_default() -> None:
    assert converted(int | None, default=None, ge=1) == {
        "type": "integer",
        "format": "int64",
        "minimum": 1,
        "required": False,
    }


def test_an_exclusive_bound_becomes_a_flag_beside_the_bound() -> None:
    schema = converted(float, gt=0, lt=1)
    assert (schema["minimum"], schema["exclusiveMinimum"]) == (0, True)
    assert (schema["maximum"], schema["exclusiveMaximum"]) == (1, True)


def test_choices_become_an_enumeration_and_a_single_one_too() -> None:
    assert converted(Literal["A", "B"])["enum"] == ["A", "B"]
    assert converted(Literal["A"])["enum"] == ["A"]


def test_a_part_is_inlined_with_its_rules_and_the_description_of_the_field() -> None:
    schema = converted(Child, description="Of the field.", default=Child())
    assert schema["description"] == "Of the field."
    assert schema["properties"]["count"]["default"] == 3
    assert schema["x-kubernetes-validations"] == [
        {
            "rule": "self.count > 1",
            "message": "count: too few; use 2",
            "reason": "FieldValueInvalid",
            "fieldPath": ".count",
        }
    ]


def test_a_part_with_a_default_defaults_to_its_own_defaults() -> None:
    assert converted(Child, default=Child())["default"] == {}


def test_a_part_with_a_default_factory_may_be_absent() -> None:
    schema = converted(Child, default_factory=Child)
    assert "default" not in schema
    assert not schema["required"]


def test_quantities_may_be_numbers_or_text() -> None:
    schema = converted(Quantity)
    assert schema["x-kubernetes-int-or-string"] is True
    assert "type" not in schema


def test_durations_are_text_of_a_pattern() -> None:
    assert converted(Duration)["pattern"].startswith("^")


def test_lists_are_atomic_unless_the_type_says_otherwise() -> None:
    keyed = {"x-kubernetes-list-type": "set"}
    names = Annotated[str, Field(max_length=9)]
    assert converted(list[names], max_length=3)["x-kubernetes-list-type"] == "atomic"
    assert converted(list[names], max_length=3, json_schema_extra=keyed)["x-kubernetes-list-type"] == "set"


@pytest.mark.parametrize(
    "annotation, complaint",
    [
        (str, "spec.field: text needs max_length"),
        (list[int], "spec.field: a list needs max_length"),
        (dict[str, int], "spec.field: a map needs a type of values and max_length"),
        (Annotated[list[str], Field(max_length=2)], "spec.field[*]: text needs max_length"),
        (int | bool, "spec.field: a CRD cannot express a choice between"),
        (Any, "spec.field: a CRD cannot express"),
    ],
    ids=str,
)
def test_what_has_no_bound_or_no_structural_form_is_refused_by_name(annotation: Any, complaint: str) -> None:
    with pytest.raises(NotStructural, match=re.escape(complaint)):
        converted(annotation)


def test_the_files_in_crds_are_what_the_types_say() -> None:
    assert crdgen.main(["--check"]) == 0


def test_a_stale_file_is_reported_by_name_and_not_touched(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crdgen, "CRDS", tmp_path)
    assert crdgen.main([]) == 0
    (tmp_path / "finetunes.yaml").write_text("edited by hand")
    assert crdgen.main(["--check"]) == 1
    assert "crds/finetunes.yaml is not what the types say: run `make generate`" in capsys.readouterr().err
    assert (tmp_path / "finetunes.yaml").read_text() == "edited by hand"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
class TestTheCrd:
    def test_is_valid_for_kubernetes(self, kind: Kind) -> None:
        kubernetes_validate.validate(yaml.safe_load(crdgen.as_yaml(kind)), "1.35", strict=True)

    def test_is_small_enough_for_client_side_apply(self, kind: Kind) -> None:
        assert len(crdgen.as_yaml(kind).encode()) < 200 * 1024

    def test_describes_every_field_in_whole_sentences(self, kind: Kind) -> None:
        fields = list(fields_of(crdgen.object_schema(kind), ""))
        undescribed = [path for path, schema in fields if not schema.get("description") and path != ".metadata"]
        assert undescribed == []
        assert [path for path, schema in fields if not schema.get("description", ".").endswith((".", ")"))] == []

    def test_names_the_default_in_the_description_of_every_field_that_has_one(self, kind: Kind) -> None:
        silent = [
            path
            for path, schema in fields_of(crdgen.object_schema(kind), "")
            if schema.get("default", {}) != {} and "efault" not in schema["description"]
        ]
        assert silent == []

    def test_points_every_rule_to_a_field_that_exists(self, kind: Kind) -> None:
        for _, schema in fields_of({"properties": {"": crdgen.object_schema(kind)}}, ""):
            for part in (schema, schema.get("items", {})):
                for rule in part.get("x-kubernetes-validations", []):
                    at = part
                    for name in rule.get("fieldPath", "").split(".")[1:]:
                        at = at["properties"][name]

    def test_refuses_what_is_not_supported_yet(self, kind: Kind) -> None:
        messages = {rule["message"] for rule in spec_of(kind)["x-kubernetes-validations"]}
        assert {f"{path}: not supported yet" for path in NOT_SUPPORTED_YET[kind.name]} <= messages


def test_taking_a_line_from_the_list_takes_the_rule_from_the_crd(monkeypatch: pytest.MonkeyPatch) -> None:
    finetune = KINDS[0]
    before = spec_of(finetune)["x-kubernetes-validations"]
    monkeypatch.setitem(NOT_SUPPORTED_YET, "FineTune", {})
    after = spec_of(finetune)["x-kubernetes-validations"]
    assert [rule for rule in before if not rule["message"].endswith(": not supported yet")] == after


def spec_of(kind: Kind) -> Schema:
    schema: Schema = crdgen.object_schema(kind)["properties"]["spec"]
    return schema


def fields_of(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Every named field below a schema with its path."""
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields_of(field, f"{path}.{name}")
        yield from fields_of(field.get("items", {}), f"{path}.{name}[*]")
