"""AdapterDeployment: verified serving of one or more adapters on one base model."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_operator.api.adapterdeploymentstatus import AdapterDeploymentStatus
from finetune_operator.api.common import BaseModelSource, Digest, Duration, ObjectMeta, Quantity, S3Uri, Spec
from finetune_operator.api.pod import Labels, PodTemplate
from finetune_operator.api.rules import Rule, exactly_one

FineTuneName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=40)]


class FineTuneRef(Spec):
    """A FineTune in this object's namespace."""

    name: FineTuneName = Field(
        description="Name of the FineTune. Its newest adapter that passed its gates is served; new ones are swapped in."
    )


class Artifact(Spec):
    """An adapter in the S3 store."""

    uri: S3Uri = Field(description="s3://bucket/path of the adapter's folder.")
    digest: Digest = Field(
        description="sha256:<64 hex digits> of the adapter, as its manifest.json states. Other content is never served."
    )


class Canary(Spec):
    """A new adapter first gets a share of the requests."""

    weight: int = Field(
        default=10,
        ge=1,
        le=99,
        description="Percentage of the requests that the new adapter answers. Default: 10. Another weight starts its "
        "time anew.",
    )
    after: Duration = Field(
        default="10m",
        description="Time after which the new adapter answers all requests, if none of its own failed. Default: 10m. "
        "After a failure the one before answers all, until there is a newer adapter or another weight.",
    )


class Adapter(Spec):
    """One adapter and the model name that clients ask for: exactly one of fineTuneRef and artifact."""

    rules = (exactly_one("fineTuneRef", "artifact"),)

    name: str = Field(
        pattern=r"^[a-z0-9]([-a-z0-9_.]*[a-z0-9])?$",
        min_length=1,
        max_length=63,
        description="The model name that clients ask for. It stays the same when the adapter behind it changes.",
    )
    fine_tune_ref: FineTuneRef | None = Field(default=None, description="Follow a FineTune.")
    artifact: Artifact | None = Field(default=None, description="Serve exactly this adapter.")
    canary: Canary | None = Field(
        default=None, description="Give a new adapter a share of the requests first. Default: all at once."
    )


# Arguments of vLLM that the operator works out; a second value would break serving or its checks.
RESERVED_ENGINE_ARGS = (
    "--model",
    "--config",
    "--host",
    "--port",
    "--served-model-name",
    "--tokenizer",
    "--enable-lora",
    "--lora-modules",
    "--max-lora-rank",
    "--max-loras",
    "--max-cpu-loras",
    "--middleware",
    "--max-model-len",
    "--quantization",
    "--tensor-parallel-size",
    "--trust-remote-code",
)


class Engine(Spec):
    """The vLLM server."""

    rules = (
        Rule(
            "!has(self.extraArgs) || self.extraArgs.all(arg, "
            f"!(arg.split('=')[0].replace('_', '-') in [{', '.join(repr(arg) for arg in RESERVED_ENGINE_ARGS)}]))",
            f"extraArgs: the operator sets {', '.join(RESERVED_ENGINE_ARGS)} itself; remove them",
            field="extraArgs",
            reason="FieldValueForbidden",
        ),
    )

    image: str | None = Field(
        default=None,
        pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._:/@-]*$",
        max_length=512,
        description="vLLM image, e.g. the official one. Default: the chart's images.engine.",
    )
    extra_args: list[Annotated[str, Field(min_length=1, max_length=512)]] = Field(
        default_factory=list,
        max_length=64,
        description="Further arguments of vLLM, e.g. --gpu-memory-utilization=0.8. Default: none. Those that the "
        "operator sets are refused.",
    )
    max_model_length: int | None = Field(
        default=None,
        ge=16,
        le=10_485_760,
        description="Longest prompt plus answer, in tokens. Default: what the model supports.",
    )
    quantization: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9_-]+$",
        max_length=64,
        description="vLLM's quantization of the base model, e.g. bitsandbytes. Default: none.",
    )


class Probe(Spec):
    """How the agent proves that an adapter changes the answers before its pod is Ready."""

    prompts: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(
        default_factory=list,
        max_length=16,
        description="Prompts to compare on. Default: a built-in few; give some that the adapter was trained for.",
    )
    min_logprob_delta: float = Field(
        default=0.001,
        ge=0,
        le=100,
        description="Smallest difference of log-probabilities between adapter and base model, over all prompts, that "
        "counts as a change. Default: 0.001. 0 turns the check off.",
    )


class ServingResources(Spec):
    """What each serving pod asks for."""

    gpus: int = Field(
        default=1,
        ge=0,
        le=16,
        description="GPUs per pod; vLLM splits the model over them. Default: 1. 0 serves on the CPU.",
    )
    gpu_resource: str = Field(
        default="nvidia.com/gpu",
        pattern=r"^[a-z0-9][-a-z0-9.]*/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        max_length=128,
        description="Name of the GPU resource on the nodes. Default: nvidia.com/gpu.",
    )
    cpu: Quantity = Field(default="1", description="CPUs that the engine requests. Default: 1. There is no limit.")
    memory: Quantity | None = Field(
        default=None,
        description="Memory of the engine, request and limit, e.g. 32Gi. Default: 2Gi requested and no limit.",
    )
    shared_memory: Quantity | None = Field(
        default=None,
        description="Size of /dev/shm, through which vLLM's processes talk. What is used of it counts as memory. "
        "Default: 1Gi.",
    )


class Service(Spec):
    """The Service in front of the pods: port 80, named as this object."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        default="ClusterIP", description="Type of the Service. Default: ClusterIP."
    )
    labels: Labels = Field(default_factory=dict, description="Added to the Service.")
    annotations: Annotated[
        dict[Annotated[str, Field(max_length=317)], Annotated[str, Field(max_length=4096)]], Field(max_length=32)
    ] = Field(default_factory=dict, description="Added to the Service, e.g. for a load balancer.")


class Autoscaling(Spec):
    """Let Kubernetes choose the number of pods; replicas is then ignored."""

    rules = (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            "minReplicas: must be at most maxReplicas",
            field="minReplicas",
        ),
        Rule(
            "self.minReplicas > 0 || self.type == 'KEDA'",
            "minReplicas: only KEDA scales to 0; use type KEDA, or at least 1",
            field="minReplicas",
        ),
        Rule(
            "(self.type == 'KEDA') == has(self.prometheusAddress)",
            "prometheusAddress: KEDA needs it and HPA does not have it; set it, or use type HPA without it",
            field="prometheusAddress",
        ),
    )

    type: Literal["HPA", "KEDA"] = Field(
        default="HPA",
        description="HPA (default): a HorizontalPodAutoscaler on CPU. KEDA: a ScaledObject on waiting requests; needs "
        "KEDA and Prometheus.",
    )
    min_replicas: int = Field(default=1, ge=0, le=1000, description="Fewest pods. Default: 1. 0 needs KEDA.")
    max_replicas: int = Field(ge=1, le=1000, description="Most pods.")
    target: int = Field(
        default=80,
        ge=1,
        le=10_000,
        description="HPA: CPU utilisation in percent of the request. KEDA: waiting requests per pod. Default: 80.",
    )
    prometheus_address: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s@]+$",
        max_length=512,
        description="KEDA: URL of the Prometheus that scrapes the pods.",
    )


class AdapterDeploymentSpec(Spec):
    """Which adapters are served, on what, and how."""

    rules = (
        Rule(
            "self.mode != 'Merge' || self.adapters.size() == 1",
            "adapters: mode Merge serves exactly one adapter; use mode Mount, or one object per adapter",
            field="adapters",
        ),
        Rule(
            "self.mode != 'Merge' || !self.adapters.exists(adapter, has(adapter.canary))",
            "adapters: a canary needs both adapters in one server; use mode Mount, or remove canary",
            field="adapters",
        ),
        Rule(
            "has(self.baseModel) || !self.adapters.exists(adapter, has(adapter.artifact))",
            "baseModel: an artifact does not say what it was trained on; set baseModel",
            field="baseModel",
            reason="FieldValueRequired",
        ),
        Rule(
            "!has(self.baseModel) || self.adapters.exists(adapter, has(adapter.artifact))",
            "baseModel: it is taken from the FineTune of fineTuneRef; remove baseModel",
            field="baseModel",
            reason="FieldValueForbidden",
        ),
    )

    adapters: list[Adapter] = Field(
        min_length=1,
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="The adapters: one or more with mode Mount, exactly one with mode Merge. All must have been "
        "trained on the same base model.",
    )
    base_model: BaseModelSource | None = Field(
        default=None,
        description="The base model; needed when an adapter is given by artifact. Default: that of the FineTunes.",
    )
    mode: Literal["Mount", "Merge"] = Field(
        default="Mount",
        description="Mount (default): LoRA on the base model; adapters are swapped in a running pod. Merge: the "
        "adapter is merged into the weights, which costs nothing per token; a new adapter rolls out like any "
        "Deployment.",
    )
    engine: Engine = Field(default=Engine(), description="The vLLM server.")
    gate: Literal["Required", "Ignore"] = Field(
        default="Required",
        description="Required (default): an adapter that did not pass the gates of its FineTune is not served, reason "
        "GateNotPassed. Ignore: it is.",
    )
    probe: Probe = Field(default=Probe(), description="How an adapter proves that it changes the answers.")
    replicas: int = Field(
        default=1, ge=0, le=1000, description="Number of pods. Default: 1. Leave it out when something else scales."
    )
    resources: ServingResources = Field(default=ServingResources(), description="What each pod asks for.")
    pod_template: PodTemplate = Field(
        default=PodTemplate(), description="Scheduling, labels and environment of the pods."
    )
    service: Service = Field(default=Service(), description="The Service in front of the pods.")
    autoscaling: Autoscaling | None = Field(
        default=None, description="Let Kubernetes choose the number of pods. Default: replicas."
    )


class AdapterDeployment(BaseModel):
    """AdapterDeployment serves adapters whose digest, gates and effect have been verified."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    api_version: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
    kind: Literal["AdapterDeployment"] = "AdapterDeployment"
    metadata: ObjectMeta
    spec: AdapterDeploymentSpec
    status: AdapterDeploymentStatus = AdapterDeploymentStatus()
