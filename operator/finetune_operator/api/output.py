"""FineTune spec.output: where the result goes."""

from typing import Literal

from pydantic import Field

from finetune_operator.api.common import HubRepo, Precision, S3Uri, SecretKeyRef, SecretRef, Spec
from finetune_operator.api.rules import Rule


class OutputS3(Spec):
    """The bucket for checkpoints, adapters and reports."""

    uri: S3Uri | None = Field(default=None, description="s3://bucket/prefix. Default: the chart's storage.uri.")
    credentials_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret in this namespace with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Default: the "
        "chart's storage.credentialsSecret, which must then exist in this namespace.",
    )


class OutputHub(Spec):
    """A repository on a hub that the result is pushed to."""

    repo: HubRepo = Field(description="Repository id, e.g. acme/support-bot. Created when absent.")
    content: Literal["Adapter", "Merged"] = Field(
        default="Adapter",
        description="What is pushed, together with the tokenizer: Adapter (default), or the Merged model, which "
        "exports must name.",
    )
    private: bool = Field(default=True, description="Whether a new repository is private. Default: true.")
    token_secret_ref: SecretKeyRef = Field(description="Hub token that may write. It reaches the export Job only.")


class Output(Spec):
    """Where the result goes."""

    rules = (
        Rule(
            "!has(self.mergedPrecision) || self.mergedPrecision == 'Auto' || "
            "(has(self.exports) && self.exports.size() > 0)",
            "mergedPrecision: only exports have it; add Merged or GGUF to exports, or remove it",
            field="mergedPrecision",
        ),
        Rule(
            "!has(self.hub) || self.hub.content != 'Merged' || (has(self.exports) && 'Merged' in self.exports)",
            "hub.content: there is no merged model to push; add Merged to exports",
            field="hub.content",
        ),
    )

    s3: OutputS3 = Field(default=OutputS3(), description="The bucket. Default: the chart's.")
    exports: list[Literal["Merged", "GGUF"]] = Field(
        default_factory=list,
        max_length=2,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Made from the adapter after training, each with its own digest and its logits compared: Merged (a "
        "plain model), GGUF (the same as one file for llama.cpp). Default: none.",
    )
    merged_precision: Precision = Field(
        default="Auto", description="Type of the weights of the exports. Default: Auto, that of the base model."
    )
    hub: OutputHub | None = Field(default=None, description="Push the result to a hub. Default: not pushed.")
