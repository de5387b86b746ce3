"""A run of one process imports little, and computes what it would have computed with everything."""

import json
import subprocess
import sys
from typing import Any

import pytest

from .families import FAMILIES

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def lean() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.trainer.lean"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_no_family_of_models_imports_a_compiler_or_quantization_up_to_its_first_step(lean: dict[str, Any]) -> None:
    assert lean["imported"] == []


def test_nothing_is_left_in_the_place_of_a_module(lean: dict[str, Any]) -> None:
    assert lean["left"] == []
    assert lean["distributed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_are_those_of_a_process_that_imported_everything(lean: dict[str, Any], family: str) -> None:
    from .lean import step_of

    assert lean["losses"][family] == step_of(family)


def test_what_was_left_out_is_imported_when_a_model_asks_for_it(lean: dict[str, Any]) -> None:
    assert lean["mask"] == [[True, False, False], [True, True, False], [True, True, True]]
    assert lean["compiled"]


def test_quantized_layers_are_found_once_there_are_some(lean: dict[str, Any]) -> None:
    assert "peft.tuners.lora.bnb.Linear4bit" in lean["quantized"]
