"""Documentation and examples are true: their YAML is valid, their rows and error messages are the code's, links lead somewhere."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prometheus_client import REGISTRY

from finetune_operator import metrics  # noqa: F401  registers them
from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.api.finetune import FineTune
from finetune_operator.reasons import FAILURES
from finetune_trainer.command import apirules
from finetune_trainer.command.finetunefile import read_finetune
from finetune_trainer.data import formats
from finetune_trainer.digest import hash_tree, tree_digest
from finetune_trainer.memory.architecture import architecture, read_config
from finetune_trainer.memory.estimate import Workload
from finetune_trainer.memory.trainable import trainable_parameters
from finetune_trainer.memory.verdict import verdict

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "charts" / "finetune-operator" / "README.md"])
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
KINDS: dict[str, Any] = {"FineTune": FineTune, "AdapterDeployment": AdapterDeployment}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def ours() -> Iterator[Any]:
    """Every object of our kinds in examples/, README.md and docs/."""
    for path in EXAMPLES:
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] in KINDS:
                yield pytest.param(document, id=str(path.relative_to(ROOT)))
    for page in PAGES:
        for block in blocks(page, "yaml"):
            for document in yaml.safe_load_all(block):
                if isinstance(document, dict) and document.get("kind") in KINDS:
                    yield pytest.param(document, id=f"{page.name}:{document['metadata']['name']}")


@pytest.mark.parametrize("document", list(ours()))
def test_every_shown_object_is_valid(document: dict[str, Any]) -> None:
    parsed = KINDS[document["kind"]].model_validate(document)
    assert document["metadata"]["namespace"] == "demo"
    assert not isinstance(parsed, FineTune) or apirules.broken(parsed) == []


RECIPES = {
    "llama-3.1-8b-lora-dolly": ("llama-3.1-8b", 13_631_488),
    "llama-3.1-70b-qlora": ("llama-3.1-70b", 828_375_040),
    "llama-2-7b-qlora-guanaco": ("llama-2-7b", 16_777_216),  # widely copied as 33,554,432
}


def test_every_recipe_fits_the_gpu_that_it_asks_for() -> None:
    assert {path.stem for path in (ROOT / "examples/recipes").iterdir()} == set(RECIPES)
    for name, (model, trained) in RECIPES.items():
        spec = read_finetune(ROOT / f"examples/recipes/{name}.yaml").spec
        shape = architecture(read_config(ROOT / "docs/shapes" / model))
        assert shape
        assert trainable_parameters(shape, spec) == trained
        assert verdict(shape, Workload(spec, spec.training.max_length)).verdict == "Fits", name


def test_the_memory_page_corrects_what_is_widely_copied() -> None:
    page = (ROOT / "docs" / "memory.md").read_text()
    assert "16,777,216 (0.25 %) | widely copied as 33,554,432" in page
    assert "does not fit: needs about" in page
    assert page.count("too low: ") >= 3
    for figure in ("2,500", "3,200", "2,100", "45.3", "54.8"):
        assert figure in page


CHART = ROOT / "charts" / "finetune-operator"


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(yaml.safe_load(block), id=page.name)
        for page in PAGES
        for block in blocks(page, "yaml")
        if "apiVersion:" not in block
    ],
)
def test_every_other_yaml_block_is_values_of_the_chart(values: dict[str, Any]) -> None:
    jsonschema.validate(values, json.loads((CHART / "values.schema.json").read_text()))


def test_the_readme_explains_the_example_that_it_links_to() -> None:
    shown = [yaml.safe_load(block) for block in blocks(ROOT / "README.md", "yaml")]
    files = [ROOT / "examples" / name for name in ("finetune.yaml", "adapterdeployment.yaml")]
    for example in (yaml.safe_load(file.read_text()) for file in files):
        counterpart = next(document for document in shown if document["kind"] == example["kind"])
        assert KINDS[example["kind"]].model_validate(counterpart) == KINDS[example["kind"]].model_validate(example)


def test_generated_parts_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name}: {target}"
        if heading:
            assert heading in headings(linked), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def readable(row: dict[str, Any]) -> None:
    form = next((found for kind in formats.FORMATS_OF if (found := formats.recognise(row, kind))), None)
    assert form is not None, f"no format has the columns {list(row)}"
    form.read(formats.with_synonyms(row, form))


GUIDE = ROOT / "docs" / "finetune.md"


@pytest.mark.parametrize("line", [line for block in blocks(GUIDE, "jsonl") for line in block.splitlines()])
def test_rows_that_are_called_valid_are(line: str) -> None:
    readable(json.loads(line))


@pytest.mark.parametrize(
    ("line", "message"), re.findall(r"^\| `(\{.+\})` \| (.+) \|$", GUIDE.read_text(), re.MULTILINE)
)
def test_rows_that_are_called_wrong_give_the_message_shown(line: str, message: str) -> None:
    with pytest.raises(formats.Invalid) as refused:
        readable(json.loads(line))
    assert str(refused.value) == message


def example_rows() -> Iterator[Any]:
    for path in sorted((ROOT / "examples" / "formats").glob("*.yaml")):
        config, tune = yaml.safe_load_all(path.read_text())
        for line in config["data"]["train.jsonl"].splitlines():
            yield pytest.param(tune["spec"]["dataset"], json.loads(line), id=path.stem)


@pytest.mark.parametrize(("dataset", "row"), list(example_rows()))
def test_rows_of_the_format_examples_are_of_their_format(dataset: dict[str, Any], row: dict[str, Any]) -> None:
    form = formats.BY_NAME[dataset["format"]]
    form.read(formats.rename(row, dataset.get("columns", {})))


def test_every_format_and_every_source_has_an_example() -> None:
    specs = [p.values[0]["spec"] for p in ours() if p.values[0]["kind"] == "FineTune"]
    assert {spec["dataset"].get("format") for spec in specs} >= set(formats.BY_NAME)
    sources = {key for spec in specs for key in spec["dataset"]["train"]}
    assert sources == {"s3", "configMap", "http", "huggingFace", "persistentVolumeClaim"}


def test_reasons_that_the_pages_name_exist() -> None:
    known = set(FAILURES)
    text = GUIDE.read_text()
    for reason in re.findall(r"fails with `([A-Z]\w+)`", text):
        assert reason in known, reason


def test_the_serving_page_explains_every_reason_of_the_agent() -> None:
    source = "".join(path.read_text() for path in (ROOT / "serving_image" / "finetune_serving").glob("*.py"))
    raised = re.findall(r'(?:Unservable\(|Refusal\(|_refuse\(\s*adapter,|return \(?)\s*"([A-Z]\w+)"', source)
    page = (ROOT / "docs" / "serving.md").read_text()
    table = page[page.index("## Messages of an adapter") : page.index("## Not supported yet")]
    shown = set(re.findall(r"`([A-Z][a-zA-Z]+)`", table))
    assert set(raised) - shown == set(), "raised by the agent, missing in docs/serving.md"
    assert shown - set(raised) - set(FAILURES) == set(), "in docs/serving.md, raised by nobody"


def test_the_serving_page_names_only_reasons_that_the_operator_gives() -> None:
    source = "".join(path.read_text() for path in (ROOT / "operator" / "finetune_operator").rglob("*.py"))
    page = (ROOT / "docs" / "serving.md").read_text()
    table = page[page.index("## Phases") : page.index("## Messages of an adapter")]
    shown = set(re.findall(r"`([A-Z][a-zA-Z]+)`", table)) - {"Merge"}
    assert {reason for reason in shown if f'"{reason}"' not in source} == set()


def test_the_ten_lines_of_the_security_page_compute_the_digest(tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name, content in {"a.txt": b"a", "sub/\u00e4.bin": b"\x00\x01", "manifest.json": b"{}"}.items():
        (tmp_path / "folder" / name).write_bytes(content)
    [script] = blocks(ROOT / "docs" / "security.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "folder")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == tree_digest(hash_tree(tmp_path / "folder"))


def test_the_metrics_of_the_operations_page_are_the_operators() -> None:
    families = [family for family in REGISTRY.collect() if family.name.startswith("finetune_operator_")]
    exported = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page[page.index("| metric |") : page.index("Alerts worth having")]
    shown = set(re.findall(r"`(finetune_operator_\w+)`", table))
    shown |= {f"finetune_operator_workqueue{suffix}" for suffix in re.findall(r"`(_\w+)`", table)}
    assert shown == exported


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        shown = re.findall(r"^make ([a-z0-9 -]+)|`make ([a-z0-9 -]+)", page.read_text(), re.MULTILINE)
        named = {target for pair in shown for target in "".join(pair).split()}
        assert named - targets == set(), page.name


def test_no_page_names_a_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/root/|/home/\w|/work/main", page.read_text()), page.name
