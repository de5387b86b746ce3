"""FineTune spec.tracking: experiment trackers that get a run's metrics, beside what is in the bucket."""

from typing import Annotated

from pydantic import Field

from finetune_operator.api.common import SecretKeyRef, SecretRef, Spec
from finetune_operator.api.rules import Rule

ServerUrl = Annotated[str, Field(pattern=r"^https?://[^\s/?#][^\s?#]*$", max_length=512)]


def no_credentials_in(field: str, instead: str) -> Rule:
    """An address is shown in status, logs and reports; a password in it would be, too."""
    return Rule(
        f"!has(self.{field}) || !self.{field}.contains('@')",
        f"{field}: no user name or password in it; use {instead}",
        field=field,
        reason="FieldValueForbidden",
    )


class MLflow(Spec):
    """An MLflow tracking server."""

    rules = (no_credentials_in("uri", "credentialsSecretRef"),)

    uri: ServerUrl = Field(description="http:// or https:// address of the server, as in MLFLOW_TRACKING_URI.")
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Experiment that the run belongs to; created when absent. Default: named as the namespace.",
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret in this namespace with the keys MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
        "MLFLOW_TRACKING_TOKEN. Default: the server is asked without credentials.",
    )


class WandB(Spec):
    """Weights & Biases, hosted or on a server of one's own."""

    rules = (no_credentials_in("baseUrl", "apiKeySecretRef"),)

    project: str | None = Field(
        default=None,
        pattern=r"^[^/\\#?%:]+$",
        max_length=128,
        description="Project that the run belongs to; created when absent. Default: named as the namespace.",
    )
    entity: str | None = Field(
        default=None,
        pattern=r"^[^/\\#?%:]+$",
        max_length=128,
        description="User or team that has the project. Default: that of the API key.",
    )
    base_url: ServerUrl = Field(
        default="https://api.wandb.ai", description="Address of the server. Default: https://api.wandb.ai."
    )
    api_key_secret_ref: SecretKeyRef = Field(description="API key. It reaches the train Job only.")


class Tracking(Spec):
    """Experiment trackers that follow the run. One that is away or refuses never fails or stops a run."""

    mlflow: MLflow | None = Field(default=None, description="An MLflow tracking server. Default: none.")
    wandb: WandB | None = Field(default=None, description="Weights & Biases. Default: none.")
