"""What the operator says about an AdapterDeployment."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.common import Condition, Status
from finetune_operator.api.finetunestatus import BaseModelStatus, Text, Time

AdapterDeploymentPhase = Literal["Pending", "Blocked", "Progressing", "Ready", "Degraded", "Failed"]


class AdapterDeploymentSummary(Status):
    """What kubectl get shows, as short text; - where there is nothing yet."""

    adapters: Text = Field(default="-", description="Number of adapters.")
    ready: Text = Field(default="-", description="Pods that serve all adapters, of all pods, e.g. 1/1.")
    adapter: Text = Field(
        default="-", description="First 12 hex digits of the digest that the first adapter's name answers with."
    )


class ProbeStatus(Status):
    """How much the adapter changes the answers."""

    logprob_delta: float | None = Field(
        default=None, description="Smallest over the pods of the difference to the base model."
    )


class CanaryStatus(Status):
    """A new adapter on trial: it gets a share of the requests beside the one in service."""

    trial: Text = Field(
        description="Names what is tried: the digest with the weight, spec.probe and spec.engine. What failed is not "
        "tried again under the same name."
    )
    state: Literal["Waiting", "Running", "Promoted", "Failed"] = Field(
        default="Waiting",
        description="Waiting: not verified on every pod yet. Running: gets its weight. Promoted: its time is over, it "
        "takes all requests. Failed: the adapter in service answers all requests.",
    )
    since: Time | None = Field(default=None, description="Since when it gets its weight on every pod (UTC).")
    reason: Text = Field(default="", description="Why it failed, in one CamelCase word.")
    message: Annotated[str, Field(max_length=4096)] = Field(default="", description="Why it failed, with the fix.")


class ServedAdapter(Status):
    """One adapter: what should be served, and what is."""

    name: Text = Field(description="The model name that clients ask for.")
    desired_digest: Text = Field(default="", description="Digest that should answer.")
    desired_uri: Text = Field(default="", description="Folder of that adapter in the bucket.")
    run_id: Text = Field(default="", description="Run of the FineTune that made it.")
    served_digest: Text = Field(default="", description="Digest that answers on every ready pod.")
    ready_pods: int = Field(default=0, ge=0, description="Pods on which the desired digest is verified and answers.")
    probe: ProbeStatus | None = Field(default=None, description="How much it changes the answers.")
    canary: CanaryStatus | None = Field(
        default=None, description="How the desired digest does as a canary, while another one is in service."
    )
    message: Annotated[str, Field(max_length=4096)] = Field(
        default="", description="Why it is not served, with the fix."
    )


class ServedHistoryEntry(Status):
    """An adapter that was served."""

    name: Text = Field(description="The model name that clients ask for.")
    digest: Text = Field(default="", description="Digest that answered.")
    uri: Text = Field(default="", description="Folder of the adapter in the bucket.")
    reason: Text = Field(default="", description="Why it was put into service.")
    served_at: Time | None = Field(default=None, description="Since when it answered (UTC).")


class AdapterDeploymentStatus(Status):
    """What is served."""

    observed_generation: int = Field(
        default=0, ge=0, description="metadata.generation that this status was computed from."
    )
    phase: AdapterDeploymentPhase = Field(
        default="Pending", description="How it is, in one word; conditions say it exactly."
    )
    reason: Text = Field(default="", description="Why it is so, in one CamelCase word.")
    message: Annotated[str, Field(max_length=32768)] = Field(
        default="", description="The same for people, with the fix where there is one."
    )
    summary: AdapterDeploymentSummary | None = Field(default=None, description="What kubectl get shows.")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        description="GatePassed, AdaptersVerified, Progressing, Ready.",
    )
    replicas: int = Field(default=0, ge=0, description="Pods that exist.")
    ready_replicas: int = Field(default=0, ge=0, description="Pods that serve all adapters, verified.")
    selector: Text = Field(default="", description="Label selector of the pods, for autoscalers.")
    url: Text = Field(default="", description="Address of the OpenAI-compatible API inside the cluster.")
    base_model: BaseModelStatus | None = Field(default=None, description="The base model that is served.")
    adapters: list[ServedAdapter] = Field(
        default_factory=list,
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="The adapters: what should be served, and what is.",
    )
    history: list[ServedHistoryEntry] = Field(
        default_factory=list, max_length=10, description="The 10 newest adapters served, newest first."
    )
