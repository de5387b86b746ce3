"""The operator's settings: one YAML file that the chart renders; every mistake in it is named by its path."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from finetune_operator.api.tracking import Tracking


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class Images(_Part):
    """The images that Jobs and Deployments run, each with tag or digest."""

    trainer: str = Field(min_length=1)
    agent: str = Field(min_length=1)
    engine: str = Field(min_length=1)
    pull_policy: str = Field(default="IfNotPresent", pattern="^(Always|IfNotPresent|Never)$")
    pull_secrets: tuple[str, ...] = ()


class StorageDefaults(_Part):
    """The bucket of every object that names none itself."""

    uri: str = Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/.*)?$")
    endpoint: str = Field(default="", pattern=r"^(https?://.+)?$")
    region: str = "us-east-1"
    credentials_secret: str = Field(default="finetune-storage", min_length=1)


class HuggingFace(_Part):
    endpoint: str = Field(default="", pattern=r"^(https?://.+)?$")


class Prepare(_Part):
    """What a prepare Job asks for."""

    cpu: str = "1"
    memory: str = "4Gi"


class EngineDefaults(_Part):
    """What every engine is started with besides; for nodes without a GPU: float32, no CUDA graphs, a small KV cache."""

    extra_args: tuple[str, ...] = ()
    env: dict[str, str] = {}


class ReportServer(_Part):
    """Where pods push reports: the address they use, and the certificate the server shows (none: plain HTTP)."""

    url: str = Field(default="http://finetune-operator-reports.finetune-system.svc:8090", pattern=r"^https?://[^/]+$")
    service: str = "finetune-operator-reports"
    port: int = Field(default=8090, ge=1, le=65535)
    cert_file: str = ""
    key_file: str = ""
    ca_config_map: str = ""


class Settings(_Part):
    images: Images
    storage: StorageDefaults
    hugging_face: HuggingFace = HuggingFace()
    prepare: Prepare = Prepare()
    engine: EngineDefaults = EngineDefaults()
    reports: ReportServer = ReportServer()
    tracking: Tracking = Tracking()
    price_per_gpu_hour: float | None = Field(default=None, ge=0, alias="pricePerGpuHour")
    pretend_gpus: bool = Field(default=False, alias="pretendGPUs")
    watch_namespaces: tuple[str, ...] = ()
    workers: int = Field(default=8, ge=1, le=64)
    resync_seconds: int = Field(default=600, ge=10)
    health_port: int = Field(default=8080, ge=0, le=65535)
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")


class SettingsError(Exception):
    """The settings file cannot be used; the message says where and why."""


def load(path: Path) -> Settings:
    """Read settings; SettingsError names the file, the field and what is wrong with it."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: must be a mapping with images and storage, is {type(data).__name__}")
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        lines = [f"  {'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise SettingsError("\n".join([f"{path}: {len(lines)} mistake(s)", *lines])) from error
