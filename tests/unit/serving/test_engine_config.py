"""What the engine is started with."""

import json
from pathlib import Path

import pytest
import yaml

from finetune_serving import engine_config
from finetune_serving.artifact import Fetched


@pytest.fixture
def adapter(tmp_path: Path) -> Fetched:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text("the adapter's")
    return Fetched(folder, rank=20)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def written(path: Path) -> dict[str, object]:
    return dict(yaml.safe_load(path.read_text()))


def test_the_largest_rank_decides_and_a_restarted_agent_keeps_what_the_engine_runs_with(
    tmp_path: Path, base: Path, adapter: Fetched
) -> None:
    path = tmp_path / "engine.yaml"
    assert engine_config.write(path, base, [adapter], min_rank=8, max_loras=3) == 32
    assert written(path)["max-lora-rank"] == 32 and written(path)["max-loras"] == 3
    assert engine_config.write(path, base, [], min_rank=64, max_loras=9) == 32
    assert written(path)["max-loras"] == 3


def test_a_base_model_without_a_chat_template_gets_the_adapters(tmp_path: Path, base: Path, adapter: Fetched) -> None:
    path = tmp_path / "engine.yaml"
    engine_config.write(path, base, [adapter], min_rank=8, max_loras=2)
    assert Path(str(written(path)["chat-template"])).read_text() == "the adapter's"
    assert Path(str(written(path)["chat-template"])).parent == tmp_path


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_base_models_own_chat_template_stays(tmp_path: Path, base: Path, adapter: Fetched, where: str) -> None:
    (base / where).write_text(json.dumps({"chat_template": "its own"}))
    path = tmp_path / "engine.yaml"
    engine_config.write(path, base, [adapter], min_rank=8, max_loras=2)
    assert "chat-template" not in written(path)
