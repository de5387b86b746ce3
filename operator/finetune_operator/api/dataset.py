"""FineTune spec.dataset: where rows come from and what shape they have."""

from typing import Literal

from pydantic import Field

from finetune_operator.api.common import (
    HubRepo,
    HubRevision,
    ObjectName,
    PersistentVolumeClaimSource,
    S3Source,
    SecretKeyRef,
    Spec,
)
from finetune_operator.api.rules import Rule, exactly_one

SPLIT = r"^\w[\w.-]*(\[\d*%?:\d*%?\])?$"  # a split, or a slice of one as the datasets library writes it


class HuggingFaceDataset(Spec):
    """A dataset repository on the Hugging Face hub, or on a hub-compatible server set in the chart."""

    repo: HubRepo = Field(description="Repository id, e.g. databricks/databricks-dolly-15k.")
    subset: str | None = Field(
        default=None, max_length=200, description="Configuration of the dataset. Default: the repository's default one."
    )
    split: str = Field(
        default="train",
        pattern=SPLIT,
        max_length=100,
        description="Split to read, or a slice of it: train[:1000], train[10%:20%]. Default: train.",
    )
    revision: HubRevision = Field(
        default="main", description="Branch, tag or commit. Default: main, resolved to a commit once per run."
    )
    token_secret_ref: SecretKeyRef | None = Field(
        default=None, description="Hub token for gated and private datasets. It reaches the prepare Job only."
    )


class ConfigMapSource(Spec):
    """One file in a ConfigMap (at most 1 MiB): good for trying something out."""

    name: ObjectName = Field(description="Name of the ConfigMap, in this object's namespace.")
    key: str = Field(
        pattern=r"^[-._a-zA-Z0-9]+$",
        max_length=253,
        description="Key that holds the file. Its ending names the file type, e.g. train.jsonl.",
    )


# A dataset is fetched from inside the cluster: it must not be a way to ask the node, the cloud's metadata service or
# the API server for credentials. This reads the text of the host; a name may still resolve to such an address.
FORBIDDEN_HOSTS = (
    r"([^/:?#]*[.])?(localhost|metadata|metadata[.]google[.]internal|kubernetes([.]default[^/:?#]*)?)[.]?",
    r"(0|127|169[.]254)[.][0-9.]*",  # this host, loopback, link-local
    r"[0-9]+([.][0-9]+){0,2}|([0-9a-fx]+[.])*0[0-9x][0-9a-f]*([.][0-9a-fx]+)*",  # the same in disguise
    r"[[](0*:|fe[89ab]|fd00:ec2:)[^/?#]*",  # IPv6
)


class HttpSource(Spec):
    """One file behind a URL."""

    rules = (
        Rule(
            f"!self.url.matches('(?i)^https?://({'|'.join(FORBIDDEN_HOSTS)})([:/?#]|$)')",
            "url: must not point to the node itself, to a metadata service or to the Kubernetes API; "
            "use the address of the server that has the file",
            field="url",
            reason="FieldValueForbidden",
        ),
    )

    url: str = Field(
        pattern=r"^https?://[^\s@]+$",
        max_length=2048,
        description="http:// or https:// URL of the file, without user name or password.",
    )
    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        max_length=64,
        description="SHA-256 of the file as 64 hex digits (sha256sum FILE). A file that does not match is refused.",
    )


class DatasetSource(Spec):
    """Where rows come from: exactly one of huggingFace, s3, persistentVolumeClaim, configMap and http. Files may be
    jsonl, json, csv or parquet, each also as .gz."""

    rules = (exactly_one("huggingFace", "s3", "persistentVolumeClaim", "configMap", "http"),)

    hugging_face: HuggingFaceDataset | None = Field(default=None, description="A dataset on the Hugging Face hub.")
    s3: S3Source | None = Field(default=None, description="A file, or a folder of files of one type, in the S3 store.")
    persistent_volume_claim: PersistentVolumeClaimSource | None = Field(
        default=None, description="A file, or a folder of files of one type, on a volume."
    )
    config_map: ConfigMapSource | None = Field(default=None, description="One file in a ConfigMap.")
    http: HttpSource | None = Field(default=None, description="One file behind a URL, checked against its SHA-256.")


class EvaluationSource(DatasetSource):
    """Where held-out rows come from: exactly one of fraction and the sources that train knows."""

    rules = (exactly_one("fraction", "huggingFace", "s3", "persistentVolumeClaim", "configMap", "http"),)

    fraction: float | None = Field(
        default=None,
        gt=0,
        le=0.5,
        description="Share of the training rows to hold out, e.g. 0.05. Chosen by training.seed; rows that are equal "
        "to a held-out row leave the training rows too.",
    )


class Columns(Spec):
    """Names of the dataset's columns where they differ from the format's own names (left)."""

    text: str | None = Field(default=None, max_length=200, description="Text: the whole text.")
    messages: str | None = Field(default=None, max_length=200, description="Messages: list of {role, content}.")
    conversations: str | None = Field(default=None, max_length=200, description="ShareGPT: list of {from, value}.")
    prompt: str | None = Field(
        default=None, max_length=200, description="PromptCompletion, Preference, UnpairedPreference: the prompt."
    )
    completion: str | None = Field(
        default=None, max_length=200, description="PromptCompletion, UnpairedPreference: the answer."
    )
    instruction: str | None = Field(default=None, max_length=200, description="Alpaca: the instruction.")
    input: str | None = Field(
        default=None, max_length=200, description="Alpaca: optional context, e.g. context for dolly."
    )
    output: str | None = Field(default=None, max_length=200, description="Alpaca: the answer, e.g. response for dolly.")
    system: str | None = Field(
        default=None, max_length=200, description="Any format: optional system message of the row."
    )
    chosen: str | None = Field(default=None, max_length=200, description="Preference: the better answer.")
    rejected: str | None = Field(default=None, max_length=200, description="Preference: the worse answer.")
    label: str | None = Field(default=None, max_length=200, description="UnpairedPreference: true for a good answer.")


# The columns of each format; system is optional in all of them.
FORMAT_COLUMNS = {
    "Text": ("text",),
    "Messages": ("messages",),
    "PromptCompletion": ("prompt", "completion"),
    "Alpaca": ("instruction", "input", "output"),
    "ShareGPT": ("conversations",),
    "Preference": ("prompt", "chosen", "rejected"),
    "UnpairedPreference": ("prompt", "completion", "label"),
}


def _only_columns_of(name: str) -> Rule:
    known = (*FORMAT_COLUMNS[name], "system")
    others = ", ".join(f"has(self.columns.{column})" for column in Columns.model_fields if column not in known)
    return Rule(
        f"self.format != '{name}' || !has(self.columns) || ![{others}].exists(set, set)",
        f"columns: format {name} has the columns {', '.join(known)}; remove the others or change format",
        field="columns",
    )


class Dataset(Spec):
    """What the model learns from. It is read, checked, rendered and tokenized on a CPU before a GPU is asked for."""

    rules = tuple(_only_columns_of(name) for name in FORMAT_COLUMNS)

    train: DatasetSource = Field(description="The rows to learn from.")
    evaluation: EvaluationSource | None = Field(
        default=None,
        description="Held-out rows for evaluation loss, gates and early stopping. Default: none, and nothing is "
        "evaluated.",
    )
    format: Literal[
        "Auto", "Text", "Messages", "PromptCompletion", "Alpaca", "ShareGPT", "Preference", "UnpairedPreference"
    ] = Field(
        default="Auto",
        description="Shape of the rows. Default: Auto, recognised by the columns of the first rows and recorded in "
        "status.dataset.format. Text {text}; Messages {messages: [{role, content}]}; PromptCompletion {prompt, "
        "completion}; Alpaca {instruction, input, output}; ShareGPT {conversations: [{from, value}]}; Preference "
        "{prompt, chosen, rejected}, or {chosen, rejected} that begin with the same prompt; UnpairedPreference {prompt, "
        "completion, label}. Prompts and answers are text or lists of messages.",
    )
    columns: Columns = Field(
        default_factory=Columns,
        description="Renames: for each of the format's own column names the dataset's name of it. Default: the "
        "format's own names. Example for dolly with format Alpaca: {input: context, output: response}.",
    )
    max_samples: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Train on at most this many rows, from the top. Default: all of them.",
    )
    on_invalid_row: Literal["Fail", "Skip"] = Field(
        default="Fail",
        description="What a row does that cannot be used. Fail (default): the run fails with file and line before a "
        "GPU is asked for. Skip: the row is left out and counted in status.dataset.skipped.",
    )
    on_too_long: Literal["Truncate", "Drop", "Fail"] = Field(
        default="Truncate",
        description="What a row does that has more tokens than training.maxLength. Truncate (default): its end is cut "
        "off and it is counted in status.dataset.truncated; with nothing left of an answer it is dropped. Of two answers "
        "each is cut with its prompt. Drop: it is left out. Fail: the run fails with file and "
        "line.",
    )
