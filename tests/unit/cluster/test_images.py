"""An image's tag follows its content, and the small images hold every module that they import."""

import ast
from pathlib import Path

import pytest

from e2e.cluster import images
from e2e.cluster.dockerfile import stage
from e2e.cluster.images import Image
from e2e.cluster.layout import REPO

ROOTS = {
    "finetune_operator": REPO / "operator",
    "finetune_trainer": REPO / "trainer_image",
    "finetune_serving": REPO / "serving_image",
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tree of sources in place of the repository's."""
    for path, text in {
        "requirements/install.sh": "install",
        "requirements/serving.txt": "aiohttp==1",
        "serving_image/Dockerfile": "FROM x\nCOPY requirements/serving.txt /\nCOPY serving_image/finetune_serving /opt/",
        "serving_image/finetune_serving/agent.py": "pass",
        "e2e/cluster/dockerfiles/base.Dockerfile": "FROM scratch",
    }.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(images, "sources", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("serving_image/finetune_serving/agent.py", True),
        ("serving_image/finetune_serving/new.py", True),
        ("requirements/serving.txt", True),
        ("serving_image/Dockerfile", True),
        ("e2e/cluster/dockerfiles/base.Dockerfile", True),
        ("requirements/trainer.txt", False),
    ],
)
def test_a_tag_changes_with_what_is_in_the_image_and_with_nothing_else(sources: Path, path: str, changes: bool) -> None:
    before = images.AGENT.tag
    file = sources / path
    file.write_text((file.read_text() if file.exists() else "") + "\nRUN true")
    assert (images.AGENT.tag != before) is changes


@pytest.mark.parametrize("image", [images.OPERATOR, images.AGENT, images.TRAINER], ids=lambda image: image.name)
def test_an_image_holds_every_module_of_ours_that_it_imports(image: Image) -> None:
    copied = {
        file
        for source in stage((REPO / image.dockerfile).read_text()).sources
        for file in ((REPO / source).rglob("*.py") if (REPO / source).is_dir() else [REPO / source])
    }
    absent = {
        f"{file.relative_to(REPO)} imports {module.relative_to(REPO)}"
        for file in copied
        if file.suffix == ".py"
        for module in _imported(file)
        if module not in copied
    }
    assert not absent, f"add them to a COPY line of {image.dockerfile}"


def _imported(file: Path) -> set[Path]:
    """The files of our packages that a module imports when it is loaded, in functions too."""
    names: set[str] = set()
    for statement in ast.walk(ast.parse(file.read_text())):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            names |= {statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)}
    found = set()
    for name in names:
        root = ROOTS.get(name.split(".")[0])
        if root:
            module = root.joinpath(*name.split("."))
            found |= {path for path in (module.with_suffix(".py"), module / "__init__.py") if path.exists()}
    return found
