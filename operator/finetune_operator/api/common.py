"""What both kinds share: the model base classes, durations and quantities, sources, references and conditions."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, WithJsonSchema
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from finetune_operator.api.rules import Rule, exactly_one

GROUP = "finetune.dev"
VERSION = "v1alpha1"


class Spec(BaseModel):
    """A part of what users write: unknown fields are errors, absent fields take the CRD's defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    rules: ClassVar[tuple[Rule, ...]] = ()

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        if cls.rules:
            schema["x-kubernetes-validations"] = [rule.as_validation() for rule in cls.rules]
        return schema


class Status(BaseModel):
    """A part of what the operator writes: fields of another version are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for field in schema["properties"].values():
            field.pop("default", None)  # status holds what the operator wrote; the API server adds nothing to it
        return schema


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Duration = Annotated[str, Field(pattern=r"^([0-9]{1,6}(s|m|h))+$", max_length=32)]
"""Hours, minutes and seconds: `90s`, `30m`, `1h30m`."""

QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
Quantity = Annotated[
    str,
    Field(pattern=QUANTITY_PATTERN, max_length=32),
    BeforeValidator(_number_as_text),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN, "maxLength": 32}),
]
"""A Kubernetes quantity (`500m`, `16Gi`, `2`); always text once parsed."""

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)]
S3Uri = Annotated[
    str, Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()=+@,:/ -]*)?$", max_length=1024)
]
VolumePath = Annotated[str, Field(pattern=r"^([^/.][^/]*(/[^/.][^/]*)*)?/?$", max_length=1024)]
HubRepo = Annotated[str, Field(pattern=r"^([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*$", max_length=200)]
HubRevision = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w./-]*$", max_length=200)]

Precision = Literal["Auto", "BF16", "FP16", "FP32"]

DURATION_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(duration: str) -> int:
    """Seconds in a Duration: `1h30m` is 5400."""
    return sum(int(count) * DURATION_UNITS[unit] for count, unit in re.findall(r"([0-9]+)(s|m|h)", duration))


class ObjectMeta(Status):
    """The part of an object's metadata that we read."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: list[str] = Field(default_factory=list)


class SecretKeyRef(Spec):
    """One key of a Secret in the object's namespace."""

    name: ObjectName = Field(description="Name of the Secret, in this object's namespace.")
    key: str = Field(
        default="token",
        pattern=r"^[-._a-zA-Z0-9]+$",
        max_length=253,
        description="Key in the Secret that holds the value. Default: token.",
    )


class SecretRef(Spec):
    """A whole Secret in the object's namespace."""

    name: ObjectName = Field(description="Name of the Secret, in this object's namespace.")


class HuggingFaceModel(Spec):
    """A model repository on the Hugging Face hub, or on a hub-compatible server set in the chart."""

    repo: HubRepo = Field(description="Repository id, e.g. meta-llama/Llama-3.1-8B.")
    revision: HubRevision = Field(
        default="main",
        description="Branch, tag or commit. Default: main. It is resolved to a commit once per run and recorded in "
        "status.baseModel.revision; a moving branch therefore never changes a run that has started.",
    )
    token_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Hub token for gated and private repositories. It reaches the CPU-only prepare Job and nothing "
        "else.",
    )


class S3Source(Spec):
    """Objects in the S3 store that the chart configures."""

    uri: S3Uri = Field(description="s3://bucket/path of one object or of a folder.")


class PersistentVolumeClaimSource(Spec):
    """Files on a volume that already exists."""

    claim_name: ObjectName = Field(
        description="Name of the PersistentVolumeClaim, in this object's namespace. Mounted read-only."
    )
    path: VolumePath = Field(
        default="",
        description="File or folder on the volume, relative to its root. Default: the root.",
    )


class BaseModelSource(Spec):
    """Where the base model comes from: exactly one of huggingFace, s3 and persistentVolumeClaim."""

    rules = (exactly_one("huggingFace", "s3", "persistentVolumeClaim"),)

    hugging_face: HuggingFaceModel | None = Field(
        default=None,
        description="A model on the Hugging Face hub. It is mirrored into the bucket once per commit, before a GPU is "
        "asked for.",
    )
    s3: S3Source | None = Field(
        default=None,
        description="A folder in the S3 store with the model's files (config.json, *.safetensors, tokenizer files). "
        "Used where it is.",
    )
    persistent_volume_claim: PersistentVolumeClaimSource | None = Field(
        default=None, description="A folder on a volume with the model's files. Used where it is."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that the model's repository carries. Default: false, which refuses such a model. "
        "Set it only for repositories whose code you have read.",
    )


class Condition(Status):
    """A metav1 condition."""

    type: str = Field(max_length=316, description="What is stated, e.g. Complete.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(
        default="", max_length=1024, description="One CamelCase word for programs: why it holds or not."
    )
    message: str = Field(
        default="", max_length=32768, description="The same for people, with the fix where there is one."
    )
    last_transition_time: str | None = Field(
        default=None,
        json_schema_extra={"format": "date-time"},
        max_length=64,
        description="When status last changed (UTC).",
    )
    observed_generation: int = Field(
        default=0, ge=0, description="metadata.generation that this condition was computed from."
    )
