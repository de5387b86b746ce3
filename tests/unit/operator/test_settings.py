"""The settings file: what the chart renders is read, and every mistake is named."""

from pathlib import Path

import pytest
import yaml

from finetune_operator.settings import Settings, SettingsError, load

SMALLEST = {
    "images": {"trainer": "t:1", "agent": "a:1", "engine": "e:1"},
    "storage": {"uri": "s3://finetune", "endpoint": "http://minio.finetune-system:9000"},
}


def written(folder: Path, content: object) -> Path:
    file = folder / "settings.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_the_smallest_file_is_enough(tmp_path: Path) -> None:
    settings = load(written(tmp_path, SMALLEST))
    assert isinstance(settings, Settings)
    assert settings.storage.credentials_secret == "finetune-storage"
    assert settings.watch_namespaces == () and settings.pretend_gpus is False


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({**SMALLEST, "storage": {"uri": "http://minio"}}, "storage.uri"),
        ({**SMALLEST, "images": {"trainer": "t:1"}}, "images.engine: Field required"),
        ({**SMALLEST, "pretendGpus": True}, "pretendGpus: Extra inputs are not permitted"),
        ({**SMALLEST, "pricePerGpuHour": -1}, "pricePerGpuHour"),
        ({**SMALLEST, "tracking": {"mlflow": {"url": "http://mlflow"}}}, "tracking.mlflow.uri: Field required"),
        ("a: [", "is not YAML"),
        ("just text", "must be a mapping"),
    ],
)
def test_a_mistake_is_named_with_file_and_field(tmp_path: Path, content: object, says: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(SettingsError) as refused:
        load(file)
    assert says in str(refused.value) and str(file) in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load(tmp_path / "none.yaml")
