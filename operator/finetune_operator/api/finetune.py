"""FineTune: one training of one base model on one dataset, from checked data to a verified adapter."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from finetune_operator.api.common import BaseModelSource, Duration, ObjectMeta, Quantity, Spec
from finetune_operator.api.dataset import Dataset
from finetune_operator.api.evaluation import Evaluation
from finetune_operator.api.finetunestatus import FineTuneStatus
from finetune_operator.api.method import Method, Objective
from finetune_operator.api.output import Output
from finetune_operator.api.pod import PodTemplate
from finetune_operator.api.rules import Rule
from finetune_operator.api.tracking import Tracking
from finetune_operator.api.training import LEARNING_RATES, Checkpoint, Training


class Resources(Spec):
    """What the training pods ask for."""

    gpus: int = Field(
        default=1,
        ge=0,
        le=16,
        description="GPUs per node. Default: 1. 0 trains on the CPU. A pod that asked for GPUs and sees fewer fails, "
        "it never trains slowly on.",
    )
    gpu_resource: str = Field(
        default="nvidia.com/gpu",
        pattern=r"^[a-z0-9][-a-z0-9.]*/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        max_length=128,
        description="Name of the GPU resource on the nodes. Default: nvidia.com/gpu.",
    )
    gpu_memory: Quantity | None = Field(
        default=None,
        description="Memory of one GPU, e.g. 24Gi. With it status.estimate says before a GPU is asked for whether the "
        "run fits. Default: unknown.",
    )
    nodes: int = Field(default=1, ge=1, le=64, description="Pods to train with, each with gpus GPUs. Default: 1.")
    cpu: Quantity = Field(default="1", description="CPUs that each pod requests. Default: 1. There is no limit.")
    memory: Quantity | None = Field(
        default=None,
        description="Memory of each pod, request and limit, e.g. 32Gi. Default: 2Gi requested and no limit.",
    )
    shared_memory: Quantity | None = Field(
        default=None,
        description="Size of /dev/shm, for several GPUs in one pod. It counts as memory. Default: that of the "
        "container runtime.",
    )


class Retry(Spec):
    """How often a run is tried again. Disruptions (eviction, node loss) cost nothing, user errors are never retried."""

    infrastructure: int = Field(
        default=6,
        ge=0,
        le=100,
        description="New attempts after failures of the infrastructure: image pull, store, network. Default: 6.",
    )
    out_of_memory: int = Field(
        default=3,
        ge=0,
        le=16,
        description="New attempts after running out of memory, each with half the micro batch and the same effective "
        "batch. Default: 3.",
    )


class Budget(Spec):
    """Stop with a checkpoint, reason BudgetExceeded, when the run has used this much. Raise it to go on."""

    rules = (
        Rule(
            "has(self.maxGpuHours) || has(self.maxCost)",
            "a budget needs a bound: set maxGpuHours or maxCost",
            reason="FieldValueRequired",
        ),
    )

    max_gpu_hours: float | None = Field(
        default=None, gt=0, le=1_000_000, description="GPU-hours over all attempts. Default: no bound."
    )
    max_cost: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000_000,
        description="Cost over all attempts, in the currency of pricePerGpuHour. Default: no bound.",
    )
    price_per_gpu_hour: float | None = Field(
        default=None,
        ge=0,
        le=10_000,
        description="Price of one GPU for one hour. Default: the chart's pricePerGpuHour.",
    )


class FineTuneSpec(Spec):
    """What is to be trained, on what, how, and where the result goes."""

    rules = (
        Rule(
            "!(self.objective.type in ['DPO', 'ORPO', 'Reward']) || self.dataset.format in ['Auto', 'Preference']",
            "dataset.format: DPO, ORPO and Reward learn from Preference rows; use Preference or Auto",
            field="dataset.format",
        ),
        Rule(
            "self.objective.type != 'KTO' || self.dataset.format in ['Auto', 'UnpairedPreference']",
            "dataset.format: KTO learns from UnpairedPreference rows; use UnpairedPreference or Auto",
            field="dataset.format",
        ),
        Rule(
            "self.objective.type != 'SFT' || !(self.dataset.format in ['Preference', 'UnpairedPreference'])",
            "dataset.format: SFT learns from single answers; change objective.type to DPO, KTO, ORPO or Reward",
            field="dataset.format",
        ),
        Rule(
            "self.objective.type == 'SFT' || self.training.packing != 'Enabled'",
            "training.packing: only SFT samples can be packed; use Auto or Disabled",
            field="training.packing",
        ),
        Rule(
            "self.objective.type == 'SFT' || self.training.lossOn == 'Completion'",
            "training.lossOn: only SFT can learn prompts; remove it",
            field="training.lossOn",
        ),
        Rule(
            "self.objective.type == 'SFT' || !(self.method.type in ['PrefixTuning', 'PromptTuning', 'PTuning'])",
            "objective.type: virtual tokens are trained with SFT only; use method.type QLoRA or LoRA",
            field="objective.type",
        ),
        Rule(
            "self.objective.type != 'Reward' || self.method.type != 'AdaLoRA'",
            "method.type: AdaLoRA cannot be trained with objective Reward; use QLoRA or LoRA",
            field="method.type",
        ),
        Rule(
            "self.objective.type != 'KTO' || self.training.batchSize > 1",
            "training.batchSize: KTO estimates from each batch how far the model is from the base model; use 2 or more",
            field="training.batchSize",
        ),
        Rule(
            "self.training.batchSize % ((type(self.training.microBatchSize) == int ? "
            "int(self.training.microBatchSize) : 1) * (self.resources.gpus > 0 ? self.resources.gpus : 1) * "
            "self.resources.nodes) == 0",
            "training.batchSize: must be a multiple of microBatchSize x GPUs x nodes, so that it is exactly the "
            "effective batch; change one of them",
            field="training.batchSize",
        ),
        Rule(
            "self.training.precision != 'FP16' || self.resources.gpus > 0",
            "training.precision: FP16 needs a GPU; use Auto",
            field="training.precision",
        ),
        Rule(
            "!has(self.training.earlyStopping) || has(self.dataset.evaluation)",
            "dataset.evaluation: training.earlyStopping needs held-out rows; set it, e.g. to {fraction: 0.05}",
            field="dataset.evaluation",
            reason="FieldValueRequired",
        ),
        Rule(
            "!has(self.evaluation.gates) || has(self.dataset.evaluation) || "
            "self.evaluation.gates.all(gate, gate.metric.contains('/'))",
            "dataset.evaluation: gates need held-out rows, unless they are about a task; set it, e.g. to "
            "{fraction: 0.05}",
            field="dataset.evaluation",
            reason="FieldValueRequired",
        ),
        Rule(
            "self.method.type != 'PrefixTuning' || self.training.gradientCheckpointing != 'Enabled'",
            "training.gradientCheckpointing: PrefixTuning keeps its vectors in the cache, which checkpointing switches "
            "off; use Auto or Disabled",
            field="training.gradientCheckpointing",
        ),
        Rule(
            "self.objective.type != 'SFT' || !has(self.evaluation.gates) || "
            "!self.evaluation.gates.exists(gate, gate.metric.startsWith('reward_'))",
            "evaluation.gates: SFT has the metrics loss, perplexity and token_accuracy; use one of them",
            field="evaluation.gates",
        ),
        Rule(
            "self.objective.type == 'SFT' || !has(self.evaluation.gates) || "
            "!self.evaluation.gates.exists(gate, gate.metric in ['perplexity', 'token_accuracy'])",
            "evaluation.gates: DPO, KTO, ORPO and Reward have the metrics loss, reward_accuracy and reward_margin; use "
            "one of them",
            field="evaluation.gates",
        ),
        Rule(
            "self.objective.type != 'Reward' || !has(self.evaluation.gates) || "
            "!self.evaluation.gates.exists(gate, gate.betterThanBase)",
            "evaluation.gates: the base model has no score that a Reward model could be better than; use max or min",
            field="evaluation.gates",
        ),
        Rule(
            "self.objective.type != 'Reward' || ((!has(self.evaluation.samples) || self.evaluation.samples.size() == 0) "
            "&& (!has(self.evaluation.tasks) || self.evaluation.tasks.size() == 0))",
            "evaluation: a Reward model scores answers and writes none; remove samples and tasks",
            field="evaluation",
            reason="FieldValueForbidden",
        ),
        Rule(
            "!has(self.output.exports) || self.output.exports.size() == 0 || "
            "!(self.method.type in ['PrefixTuning', 'PromptTuning', 'PTuning'])",
            "output.exports: virtual tokens cannot be merged into the weights; remove exports or change method.type",
            field="output.exports",
        ),
        Rule(
            "!has(self.output.exports) || !('GGUF' in self.output.exports) || self.objective.type != 'Reward'",
            "output.exports: GGUF has no head for the score of a Reward model; remove GGUF, or use Merged",
            field="output.exports",
        ),
        Rule(
            "!has(self.activeDeadline) || duration(self.activeDeadline) >= duration('1m')",
            "activeDeadline: at least 1m",
            field="activeDeadline",
        ),
    )

    base_model: BaseModelSource = Field(description="The model to tune.")
    dataset: Dataset = Field(description="What it learns from.")
    objective: Objective = Field(default=Objective(), description="What is optimised. Default: SFT.")
    method: Method = Field(default=Method(), description="How the model is adapted. Default: QLoRA of rank 16.")
    training: Training = Field(default=Training(), description="The training loop.")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="When the state of the run is saved.")
    evaluation: Evaluation = Field(default=Evaluation(), description="How the result is judged.")
    resources: Resources = Field(default=Resources(), description="What the training pods ask for.")
    pod_template: PodTemplate = Field(
        default=PodTemplate(), description="Scheduling, labels and environment of the pods."
    )
    output: Output = Field(default=Output(), description="Where the result goes.")
    tracking: Tracking | None = Field(
        default=None,
        description="Experiment trackers that get the metrics too. An edit restarts nothing: it holds from the next "
        "attempt on. Default: the chart's tracking; {} for none.",
    )
    queue_name: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        max_length=63,
        description="Kueue LocalQueue in this namespace that admits the Jobs. Default: no queue.",
    )
    suspend: bool = Field(
        default=False,
        description="true stops the run with a checkpoint and frees its GPUs; false goes on from there, at no cost of "
        "a retry. Default: false.",
    )
    active_deadline: Duration | None = Field(
        default=None,
        description="Longest time of the whole run, e.g. 12h; then it fails with reason DeadlineExceeded. Default: "
        "none.",
    )
    ttl_after_finished: Duration | None = Field(
        default=None,
        description="Delete this object that long after it finished, e.g. 72h. What it wrote follows deletionPolicy. "
        "Default: never.",
    )
    retry: Retry = Field(default=Retry(), description="How often a run is tried again.")
    budget: Budget | None = Field(default=None, description="What the run may use. Default: no bound.")
    deletion_policy: Literal["Retain", "Delete"] = Field(
        default="Retain",
        description="What happens to checkpoints and adapters in the bucket when this object is deleted. Retain "
        "(default), or Delete, which never removes what another object still names.",
    )

    @model_validator(mode="before")
    @classmethod
    def _learning_rate_of_the_objective(cls, data: Any) -> Any:
        # A default that a schema cannot state: it depends on another part of the spec.
        if not isinstance(data, dict):
            return data
        objective, training = ({} if data.get(part) is None else data[part] for part in ("objective", "training"))
        if not isinstance(objective, dict) or not isinstance(training, dict):
            return data
        default = LEARNING_RATES.get(str(objective.get("type", "SFT")))
        if default is None or {"learningRate", "learning_rate"} & training.keys():
            return data
        return {**data, "training": {**training, "learningRate": default}}


class FineTune(BaseModel):
    """FineTune trains an adapter of a base model and proves what it made."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    api_version: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
    kind: Literal["FineTune"] = "FineTune"
    metadata: ObjectMeta
    spec: FineTuneSpec
    status: FineTuneStatus = FineTuneStatus()
