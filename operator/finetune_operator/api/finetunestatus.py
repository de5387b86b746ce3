"""What the operator says about a FineTune."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.common import Condition, Status

Time = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]
Text = Annotated[str, Field(max_length=1024)]
Metrics = Annotated[dict[str, float], Field(max_length=64)]

FineTunePhase = Literal[
    "Pending", "Preparing", "Queued", "Training", "Evaluating", "Exporting", "Succeeded", "Failed", "Suspended"
]


class FineTuneSummary(Status):
    """What kubectl get shows, as short text; - where there is nothing yet."""

    progress: Text = Field(default="-", description="Steps done of steps to do, e.g. 120/400.")
    loss: Text = Field(default="-", description="Newest training loss.")
    eval: Text = Field(default="-", description="Evaluation loss of the adapter.")
    eta: Text = Field(default="-", description="Time that training still takes, e.g. 3m.")
    adapter: Text = Field(default="-", description="First 12 hex digits of the adapter's digest.")
    cost: Text = Field(default="-", description="GPU-hours used, and their price where one is set.")


class RunStatus(Status):
    """The current run: one training of one set of inputs."""

    id: Text = Field(
        default="", description="Hash of what is trained; names the run's folder in the bucket. Known once prepared."
    )
    inputs: Text = Field(
        default="", description="Hash of the parts of spec that are trained; a change of it starts a new run."
    )
    trainer_image: Text = Field(
        default="", description="Trainer image of the run. A newer one in the chart neither restarts nor changes it."
    )
    attempt: int = Field(default=0, ge=0, description="Number of the newest attempt, from 1. Each attempt is one Job.")
    job_name: Text = Field(default="", description="Job of the newest attempt.")
    started_at: Time | None = Field(default=None, description="When the run started (UTC).")
    trained_at: Time | None = Field(
        default=None, description="When its adapter was there (UTC); from then on only exports are made."
    )
    finished_at: Time | None = Field(default=None, description="When the run ended (UTC).")
    exports: Text = Field(
        default="", description="Hash of what spec.output asked to be exported; a change of it exports again."
    )
    resumed_from_step: int | None = Field(
        default=None, ge=0, description="Step of the checkpoint that the newest attempt went on from."
    )
    micro_batch: int | None = Field(
        default=None, ge=1, description="Samples that one GPU computes at once, as used by the newest attempt."
    )
    changed: list[Text] = Field(
        default_factory=list,
        max_length=32,
        description="What was changed to go on, e.g. a smaller micro batch after running out of memory.",
    )
    report: Text = Field(default="", description="Page with curves, data, answers and figures of the run.")
    disruptions: int = Field(
        default=0, ge=0, description="Attempts that ended by eviction, preemption, node loss or suspension."
    )
    gpu_seconds: float = Field(default=0, ge=0, description="GPU time of the attempts that ended, in seconds.")
    infrastructure_retries: int = Field(default=0, ge=0, description="Retries used of spec.retry.infrastructure.")
    out_of_memory_retries: int = Field(default=0, ge=0, description="Retries used of spec.retry.outOfMemory.")


class TrackerStatus(Status):
    """The run in an experiment tracker."""

    name: Literal["MLflow", "WandB"] = Field(description="The tracker.")
    url: Text = Field(default="", description="The run's page.")
    message: Text = Field(
        default="", description="Why it takes nothing now or, in the end, what it did not take; empty when all is well."
    )


class ProgressStatus(Status):
    """How far training is, as last reported by the pod."""

    step: int = Field(default=0, ge=0, description="Optimizer steps done.")
    total_steps: int = Field(default=0, ge=0, description="Optimizer steps to do.")
    epoch: float = Field(default=0, ge=0, description="Passes over the training rows done.")
    loss: float | None = Field(default=None, description="Training loss of the newest steps.")
    eval_loss: float | None = Field(default=None, description="Newest evaluation loss.")
    learning_rate: float | None = Field(default=None, description="Learning rate of the newest step.")
    tokens_per_second: float | None = Field(default=None, description="Tokens learned per second, padding not counted.")
    eta_seconds: int | None = Field(default=None, ge=0, description="Seconds that training still takes.")
    tracking: list[TrackerStatus] = Field(
        default_factory=list, max_length=4, description="The run in the experiment trackers of spec.tracking."
    )
    reported_at: Time | None = Field(default=None, description="When the pod reported this (UTC).")


class TaskDataStatus(Status):
    """What spec.evaluation.tasks ask, as prepared."""

    questions: int = Field(default=0, ge=0, description="Questions of all tasks.")
    digest: Text = Field(default="", description="Digest of the tasks' data and of how it is asked.")
    uri: Text = Field(default="", description="Where the data is.")


class DatasetStatus(Status):
    """The training data as prepared."""

    format: Text = Field(default="", description="Format of the rows, as recognised or set.")
    samples: int = Field(default=0, ge=0, description="Samples to learn from.")
    evaluation_samples: int = Field(default=0, ge=0, description="Held-out samples.")
    tokens: int = Field(default=0, ge=0, description="Tokens in the training samples.")
    truncated: int = Field(default=0, ge=0, description="Samples cut to maxLength.")
    dropped: int = Field(default=0, ge=0, description="Samples left out as longer than maxLength.")
    skipped: int = Field(default=0, ge=0, description="Rows left out as invalid.")
    duplicates: int = Field(default=0, ge=0, description="Samples that occur more than once.")
    digest: Text = Field(default="", description="Digest of the prepared data.")
    uri: Text = Field(default="", description="Where the prepared data is.")
    tasks: TaskDataStatus | None = Field(default=None, description="What spec.evaluation.tasks ask, as prepared.")


class GPUMemoryEstimate(Status):
    """Memory of one GPU that the run is expected to need, as quantities."""

    low: Text = Field(default="", description="At least this much.")
    expected: Text = Field(default="", description="Most likely this much.")
    high: Text = Field(default="", description="At most this much.")


class EstimateStatus(Status):
    """Whether the run fits, estimated before a GPU is asked for."""

    gpu_memory: GPUMemoryEstimate | None = Field(
        default=None, description="Memory per GPU with the micro batch that would be used."
    )
    verdict: Literal["Fits", "DoesNotFit", "Unknown"] = Field(
        default="Unknown", description="Fits, DoesNotFit, or Unknown when resources.gpuMemory is not set."
    )
    largest_micro_batch: int | None = Field(default=None, ge=0, description="Largest micro batch that fits.")
    gradient_checkpointing: bool | None = Field(
        default=None, description="Whether activations are to be computed twice so that it fits."
    )
    shards: int | None = Field(
        default=None, ge=2, description="GPUs that share the base model, where one has no room for it whole."
    )
    message: Text = Field(default="", description="What would make it fit, where it does not.")


class BaseModelStatus(Status):
    """The base model that was resolved."""

    revision: Text = Field(default="", description="Commit of a hub model; otherwise the short digest.")
    digest: Text = Field(default="", description="Digest of the model's files.")
    uri: Text = Field(default="", description="Where the model is read from.")
    parameters: int = Field(default=0, ge=0, description="Number of the model's parameters.")


class AdapterStatus(Status):
    """An adapter: the immutable result of a run, named by its digest."""

    uri: Text = Field(default="", description="Folder of the adapter in the bucket.")
    digest: Text = Field(default="", description="sha256 over its files; manifest.json beside them lists them.")
    size_bytes: int = Field(default=0, ge=0, description="Bytes of all its files.")
    rank: int = Field(default=0, ge=0, description="Largest LoRA rank in it.")
    trainable_parameters: int = Field(default=0, ge=0, description="Number of trained parameters.")
    gate_passed: bool | None = Field(
        default=None, description="Whether it passed all gates of its run; true when there were none."
    )
    base_model_uri: Text = Field(default="", description="Base model that it was trained on.")
    base_model_digest: Text = Field(default="", description="Digest of that base model.")
    run_id: Text = Field(default="", description="Run that made it.")
    method: Text = Field(default="", description="spec.method.type that made it.")
    mount_refusal: Text = Field(
        default="", description="Why vLLM cannot mount it on the base model, and what to do; empty when it can."
    )
    merge_refusal: Text = Field(
        default="", description="Why it cannot be served merged into the base model, and what to do; empty when it can."
    )


class GateStatus(Status):
    """A gate and whether it was passed."""

    metric: Text = Field(description="The metric.")
    passed: bool = Field(description="Whether the adapter passed.")
    value: float | None = Field(default=None, description="The adapter's value.")
    base: float | None = Field(default=None, description="The base model's value.")
    message: Text = Field(default="", description="What was compared, e.g. loss 1.021 <= 1.2.")


class EvaluationStatus(Status):
    """Base model and adapter on the held-out data, and on tasks."""

    base: Metrics = Field(
        default_factory=dict, description="The base model's metrics; those of a task are named <task>/<metric>."
    )
    adapter: Metrics = Field(default_factory=dict, description="The adapter's metrics.")
    lower_is_better: list[Text] = Field(
        default_factory=list, max_length=64, description="Metrics of tasks of which less is better, e.g. perplexities."
    )
    tasks: Text = Field(default="", description="Digest of the tasks that were answered, as in status.dataset.tasks.")
    gates: list[GateStatus] = Field(
        default_factory=list, max_length=16, description="The gates of spec.evaluation, in order."
    )
    passed: bool | None = Field(default=None, description="Whether all gates were passed; true when there are none.")


class ExportStatus(Status):
    """Something that was made from the adapter."""

    type: Literal["Merged", "GGUF", "Hub"] = Field(description="What it is.")
    uri: Text = Field(default="", description="Where it is.")
    digest: Text = Field(default="", description="Digest of its files.")
    size_bytes: int = Field(default=0, ge=0, description="Bytes of all its files.")
    message: Text = Field(default="", description="How it was verified.")


class CostStatus(Status):
    """What the run has used so far, over all attempts."""

    gpu_hours: float = Field(default=0, ge=0, description="GPU-hours.")
    amount: float | None = Field(default=None, ge=0, description="Their price, where a price per GPU-hour is set.")


class HistoryEntry(AdapterStatus):
    """A run that ended, and the adapter that it made, if any."""

    result: Literal["Succeeded", "Failed", "Cancelled"] | None = Field(default=None, description="How the run ended.")
    reason: Text = Field(default="", description="Why it ended so.")
    finished_at: Time | None = Field(default=None, description="When it ended (UTC).")


class FineTuneStatus(Status):
    """What is known about the run."""

    observed_generation: int = Field(
        default=0, ge=0, description="metadata.generation that this status was computed from."
    )
    phase: FineTunePhase = Field(
        default="Pending", description="Where the run is, in one word; conditions say it exactly."
    )
    reason: Text = Field(default="", description="Why it is there, in one CamelCase word.")
    message: Annotated[str, Field(max_length=32768)] = Field(
        default="", description="The same for people, with the fix where there is one."
    )
    summary: FineTuneSummary | None = Field(default=None, description="What kubectl get shows.")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        description="DatasetValid, FitsGPU, GatePassed, Complete, Failed, Suspended.",
    )
    run: RunStatus | None = Field(default=None, description="The current run.")
    progress: ProgressStatus | None = Field(default=None, description="How far training is.")
    dataset: DatasetStatus | None = Field(default=None, description="The training data as prepared.")
    estimate: EstimateStatus | None = Field(default=None, description="Whether the run fits.")
    base_model: BaseModelStatus | None = Field(default=None, description="The base model that was resolved.")
    adapter: AdapterStatus | None = Field(default=None, description="The newest adapter.")
    evaluation: EvaluationStatus | None = Field(
        default=None, description="How the newest adapter compares with the base model."
    )
    exports: list[ExportStatus] = Field(
        default_factory=list, max_length=8, description="What was made from the newest adapter."
    )
    cost: CostStatus | None = Field(default=None, description="What the run has used so far.")
    history: list[HistoryEntry] = Field(
        default_factory=list, max_length=10, description="The 10 newest runs that ended, newest first."
    )
