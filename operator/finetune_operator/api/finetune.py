"""FineTune: one training of one base model on one dataset, from checked data to a verified adapter."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.alias_generators import to_camel

from finetune_operator.api.common import (
    BaseModelSource,
    Duration,
    HubRepo,
    HubRevision,
    ObjectMeta,
    ObjectName,
    PersistentVolumeClaimSource,
    Quantity,
    S3Source,
    S3Uri,
    SecretKeyRef,
    SecretRef,
    Spec,
)
from finetune_operator.api.finetunestatus import FineTuneStatus
from finetune_operator.api.pod import PodTemplate

ModuleName = Annotated[str, Field(min_length=1, max_length=253)]
Precision = Literal["Auto", "BF16", "FP16", "FP32"]


# ---- dataset ---------------------------------------------------------------------------------------------------------


class HuggingFaceDataset(Spec):
    """A dataset repository on the Hugging Face hub, or on a hub-compatible server set in the chart."""

    repo: HubRepo = Field(description="Repository id, e.g. databricks/databricks-dolly-15k.")
    subset: str | None = Field(
        default=None, max_length=200, description="Configuration of the dataset. Default: the repository's default one."
    )
    split: str = Field(
        default="train", pattern=r"^\w[\w.-]*$", max_length=100, description="Split to read. Default: train."
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


class HttpSource(Spec):
    """One file behind a URL."""

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

    hugging_face: HuggingFaceDataset | None = Field(default=None, description="A dataset on the Hugging Face hub.")
    s3: S3Source | None = Field(default=None, description="A file, or a folder of files of one type, in the S3 store.")
    persistent_volume_claim: PersistentVolumeClaimSource | None = Field(
        default=None, description="A file, or a folder of files of one type, on a volume."
    )
    config_map: ConfigMapSource | None = Field(default=None, description="One file in a ConfigMap.")
    http: HttpSource | None = Field(default=None, description="One file behind a URL, checked against its SHA-256.")


class EvaluationSource(DatasetSource):
    """Where held-out rows come from: exactly one of fraction and the sources that train knows."""

    fraction: float | None = Field(
        default=None,
        gt=0,
        le=0.5,
        description="Share of the training rows to hold out, e.g. 0.05. Chosen by training.seed; rows that are equal to a held-out "
        "row leave the training rows too.",
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


class Dataset(Spec):
    """What the model learns from. It is read, checked, rendered and tokenized on a CPU before a GPU is asked for."""

    train: DatasetSource = Field(description="The rows to learn from.")
    evaluation: EvaluationSource | None = Field(
        default=None,
        description="Held-out rows for evaluation loss, gates and early stopping. Default: none, and nothing is evaluated.",
    )
    format: Literal[
        "Auto", "Text", "Messages", "PromptCompletion", "Alpaca", "ShareGPT", "Preference", "UnpairedPreference"
    ] = Field(
        default="Auto",
        description="Shape of the rows. Default: Auto, recognised by the columns of the first rows and recorded in status.dataset.format. "
        "Text {text}; Messages {messages: [{role, content}]}; PromptCompletion {prompt, completion}; Alpaca {instruction, input, output}; "
        "ShareGPT {conversations: [{from, value}]}; Preference {prompt, chosen, rejected}; UnpairedPreference {prompt, completion, label}.",
    )
    columns: Columns = Field(
        default_factory=Columns,
        description="Renames: for each of the format's own column names the dataset's name of it. Default: the format's own names. "
        "Example for dolly with format Alpaca: {input: context, output: response}.",
    )
    max_samples: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Train on at most this many rows, from the top. Default: all of them.",
    )
    on_invalid_row: Literal["Fail", "Skip"] = Field(
        default="Fail",
        description="What a row does that cannot be used. Fail (default): the run fails with file and line before a GPU is asked for. "
        "Skip: the row is left out and counted in status.dataset.skipped.",
    )
    on_too_long: Literal["Truncate", "Drop", "Fail"] = Field(
        default="Truncate",
        description="What a row does that has more tokens than training.maxLength. Truncate (default): its end is cut off and it is counted "
        "in status.dataset.truncated. Drop: it is left out. Fail: the run fails with file and line.",
    )


# ---- objective and method --------------------------------------------------------------------------------------------


class Objective(Spec):
    """What is optimised."""

    type: Literal["SFT", "DPO", "KTO", "ORPO", "Reward"] = Field(
        default="SFT",
        description="SFT (default): imitate the answers. DPO, ORPO: prefer the chosen answers of Preference rows. KTO: the same from "
        "UnpairedPreference rows. Reward: a model that scores answers, from Preference rows.",
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="DPO, KTO: how strongly the model is held to the base model. ORPO: weight of the preference term. Default: 0.1.",
    )


class Lora(Spec):
    """Low-rank adaptation: the base model stays frozen, two small matrices per target are trained."""

    rank: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="Rank r of the matrices. Default: 16. 8 for a start, 32 to 64 for complex tasks; size and memory grow with it.",
    )
    alpha: int = Field(
        default=32,
        ge=1,
        le=8192,
        description="The update is scaled by alpha / rank. Default: 32. Rule of thumb: twice the rank.",
    )
    dropout: float = Field(
        default=0.05, ge=0, le=0.9, description="Dropout before the matrices while training. Default: 0.05."
    )
    target_modules: list[ModuleName] = Field(
        default=["all-linear"],
        min_length=1,
        max_length=64,
        description="Layers to adapt. Default: [all-linear], every linear layer but the output head. Otherwise module names such as "
        "q_proj, or exactly one regular expression over full module names.",
    )
    exclude_modules: list[ModuleName] = Field(
        default_factory=list,
        max_length=64,
        description="Module names that are left out although they match targetModules. Default: none.",
    )
    modules_to_save: list[ModuleName] = Field(
        default_factory=list,
        max_length=16,
        description="Layers that are trained and stored whole, e.g. lm_head. Default: none. Such an adapter can only be served merged.",
    )
    bias: Literal["None", "All", "LoraOnly"] = Field(
        default="None",
        description="Which biases are trained: None (default), All, or LoraOnly (those of the target layers).",
    )
    use_rslora: bool = Field(
        default=False,
        description="Scale by alpha / sqrt(rank) (rsLoRA), which keeps high ranks stable. Default: false.",
    )
    use_dora: bool = Field(
        default=False,
        description="Train a magnitude per weight row too (DoRA): better at low ranks, slower. Default: false.",
    )
    initialization: Literal["Default", "Gaussian", "PiSSA", "OLoRA", "EVA", "LoftQ"] = Field(
        default="Default",
        description="How the matrices start. Default: Default (Kaiming, zero). PiSSA and OLoRA start from the base weights, EVA from the "
        "data, LoftQ from the quantization error.",
    )
    layers_to_transform: list[Annotated[int, Field(ge=0, le=1000)]] = Field(
        default_factory=list,
        max_length=256,
        description="Indices of the layers to adapt, counted from 0. Default: all layers.",
    )
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=1024)]], Field(max_length=64)] = Field(
        default_factory=dict,
        description="Other ranks for modules that match these names or regular expressions. Default: none.",
    )
    alpha_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=8192)]], Field(max_length=64)] = Field(
        default_factory=dict,
        description="Other alphas for modules that match these names or regular expressions. Default: none.",
    )
    lora_plus_ratio: float | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Learning rate of matrix B divided by that of matrix A (LoRA+), e.g. 16. Default: both equal.",
    )


class Quantization(Spec):
    """How the frozen base weights are stored while training."""

    type: Literal["NF4", "FP4", "INT8", "None"] = Field(
        default="NF4",
        description="NF4 (default of QLoRA) and FP4: 4 bit. INT8: 8 bit. None (default of the other methods): unquantized, in training.precision.",
    )
    double_quant: bool = Field(
        default=True,
        description="4 bit: quantize the quantization constants too, which saves 0.4 bit per weight. Default: true.",
    )
    compute_dtype: Precision = Field(
        default="Auto",
        description="4 bit: type that weights are expanded to for computing. Default: Auto, the same as training.precision.",
    )


class AdaLora(Spec):
    """LoRA with a budget of ranks that moves to the layers that need it."""

    initial_rank: int = Field(default=12, ge=1, le=1024, description="Rank of every target at the start. Default: 12.")
    target_rank: int = Field(default=8, ge=1, le=1024, description="Average rank at the end. Default: 8.")
    alpha: int = Field(default=32, ge=1, le=8192, description="Scale of the update. Default: 32.")
    dropout: float = Field(
        default=0.05, ge=0, le=0.9, description="Dropout before the matrices while training. Default: 0.05."
    )
    target_modules: list[ModuleName] = Field(
        default=["all-linear"],
        min_length=1,
        max_length=64,
        description="Layers to adapt, as in method.lora. Default: [all-linear].",
    )
    warmup_ratio: float = Field(
        default=0.1, ge=0, le=0.9, description="Share of the steps before ranks are first cut. Default: 0.1."
    )
    final_ratio: float = Field(
        default=0.2, ge=0, le=0.9, description="Share of the steps at the end with fixed ranks. Default: 0.2."
    )
    orthogonal_weight: float = Field(
        default=0.5, ge=0, le=10, description="Weight of the orthogonality penalty. Default: 0.5."
    )


class IA3(Spec):
    """One trained vector per target: the smallest adapter."""

    target_modules: list[ModuleName] = Field(
        default_factory=list,
        max_length=64,
        description="Layers whose output is scaled. Default: the architecture's own (k_proj, v_proj, down_proj for Llama).",
    )
    feedforward_modules: list[ModuleName] = Field(
        default_factory=list,
        max_length=64,
        description="Those targets whose input is scaled instead. Default: the architecture's own (down_proj for Llama).",
    )


class VirtualTokens(Spec):
    """Trained vectors in front of every prompt: PrefixTuning, PromptTuning and PTuning."""

    count: int = Field(
        default=20, ge=1, le=1024, description="Number of virtual tokens. Default: 20. They count towards the context."
    )
    init_text: str = Field(
        default="",
        max_length=4096,
        description="PromptTuning: text whose embeddings the vectors start from. Default: random vectors.",
    )
    projection: bool = Field(
        default=False,
        description="PrefixTuning: train through a two-layer projection, which is more stable. Default: false.",
    )


class Method(Spec):
    """How the model is adapted without training all of it."""

    type: Literal["QLoRA", "LoRA", "AdaLoRA", "IA3", "PrefixTuning", "PromptTuning", "PTuning"] = Field(
        default="QLoRA",
        description="QLoRA (default): LoRA on a 4-bit base model. LoRA: on the unquantized (or INT8) one, about a third faster where it fits. "
        "AdaLoRA, IA3, PrefixTuning, PromptTuning, PTuning: the other methods of PEFT.",
    )
    # The blocks below may be absent in the object; their defaults hold then.
    lora: Lora = Field(default_factory=Lora, description="Options of QLoRA and LoRA.")
    quantization: Quantization = Field(
        default_factory=Quantization,
        description="How the base model is quantized. Default: NF4 for QLoRA, None for the other methods.",
    )
    ada_lora: AdaLora = Field(default_factory=AdaLora, description="Options of AdaLoRA.")
    ia3: IA3 = Field(default_factory=IA3, description="Options of IA3.")
    virtual_tokens: VirtualTokens = Field(
        default_factory=VirtualTokens, description="Options of PrefixTuning, PromptTuning and PTuning."
    )

    @model_validator(mode="before")
    @classmethod
    def _quantize_only_qlora_by_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and "quantization" not in data and data.get("type", "QLoRA") != "QLoRA":
            return {**data, "quantization": {"type": "None"}}
        return data


# ---- training --------------------------------------------------------------------------------------------------------


class EarlyStopping(Spec):
    """Stop when the evaluation loss no longer falls, and keep the best checkpoint."""

    patience: int = Field(
        default=3,
        ge=1,
        le=100,
        description="Stop after this many evaluations (one per checkpoint) without a lower loss. Default: 3.",
    )


MicroBatchSize = Annotated[
    int | Literal["auto"],
    WithJsonSchema(
        {"x-kubernetes-int-or-string": True, "pattern": "^auto$", "minimum": 1, "maximum": 4096, "maxLength": 4}
    ),
]


class Training(Spec):
    """The training loop."""

    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Passes over the training rows, e.g. 3 or 0.5. Default: 3 unless maxSteps is set.",
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Number of optimizer steps, instead of epochs. Default: none."
    )
    learning_rate: float = Field(
        default=2e-4,
        gt=0,
        le=10,
        description="Peak learning rate. Default: 0.0002. Adapters want more than full fine-tuning: 1e-4 to 2e-4.",
    )
    scheduler: Literal[
        "Linear", "Cosine", "CosineWithRestarts", "Polynomial", "Constant", "ConstantWithWarmup", "InverseSqrt"
    ] = Field(
        default="Cosine", description="How the learning rate moves after the warm-up. Default: Cosine, down to zero."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, le=1, description="Share of the steps in which the learning rate rises. Default: 0.03."
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Weight decay of the trained weights. Default: 0.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, le=1000, description="Gradients are clipped to this norm. Default: 1; 0 turns it off."
    )
    optimizer: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "lion_8bit",
        "adafactor",
        "sgd",
    ] = Field(
        default="adamw_torch",
        description="Optimizer. Default: adamw_torch. paged_adamw_32bit and paged_adamw_8bit move their state to host memory when the GPU is "
        "full; the 8bit ones need a quarter of the state's memory.",
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        le=65536,
        description="Samples per optimizer step, over all GPUs and nodes: the effective batch. Default: 16. It never changes by itself; "
        "accumulation steps are batchSize / (microBatchSize x GPUs).",
    )
    micro_batch_size: MicroBatchSize = Field(
        default="auto",
        description="Samples that one GPU computes at once, or auto (default): the largest that fits by the memory estimate. It changes speed "
        "and memory, not the result.",
    )
    max_length: int = Field(
        default=1024, ge=16, le=1_048_576, description="Longest sample in tokens. Default: 1024. See dataset.onTooLong."
    )
    packing: Literal["Auto", "Enabled", "Disabled"] = Field(
        default="Auto",
        description="Put several short samples into one row of maxLength tokens, without letting them see each other: several times faster. "
        "Auto (default): enabled for SFT, disabled otherwise. When enabled a row counts as one sample of batchSize.",
    )
    loss_on: Literal["Completion", "All"] = Field(
        default="Completion",
        description="Tokens that are learned. Completion (default): answers and assistant turns only. All: prompts too. Text rows have no "
        "prompt and are learned whole.",
    )
    gradient_checkpointing: Literal["Auto", "Enabled", "Disabled"] = Field(
        default="Auto",
        description="Compute activations twice instead of keeping them: much less memory, about a quarter slower. Auto (default): only when "
        "the memory estimate says that it is needed.",
    )
    precision: Precision = Field(
        default="Auto",
        description="Type for computing. Auto (default): BF16 where the hardware has instructions for it, otherwise FP32.",
    )
    neftune_alpha: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="Noise on the embeddings (NEFTune), e.g. 5: often better chat answers. Default: none.",
    )
    seed: int = Field(
        default=42,
        ge=0,
        le=2_147_483_647,
        description="Seed of everything random. Default: 42. The same inputs and seed are the same run.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="Stop early when the evaluation loss no longer falls. Default: train to the end."
    )

    @model_validator(mode="before")
    @classmethod
    def _three_epochs_by_default(cls, data: Any) -> Any:
        # The one default that a schema cannot state: it depends on the other field.
        if isinstance(data, dict) and not {"epochs", "maxSteps", "max_steps"} & {
            key for key, value in data.items() if value is not None
        }:
            return {**data, "epochs": 3.0}
        return data


CheckpointEvery = Annotated[
    int | str,
    BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.isdecimal() else value),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "pattern": r"^(([0-9]{1,6}(s|m|h))+|epoch)$",
            "minimum": 1,
            "maximum": 10_000_000,
            "maxLength": 32,
        }
    ),
]


class Checkpoint(Spec):
    """When the state of the run is saved to the bucket. A run that is interrupted goes on from there."""

    every: CheckpointEvery = Field(
        default="10m",
        description="Time such as 10m (default), a number of steps, or epoch. A pod that is told to stop saves one in any case.",
    )
    keep: int = Field(
        default=2, ge=1, le=100, description="Newest checkpoints that are kept in the bucket. Default: 2."
    )


class Gate(Spec):
    """A bar that the adapter must pass before an AdapterDeployment serves it."""

    metric: str = Field(
        pattern=r"^[a-z0-9_]+(/[a-z0-9_,]+)?$",
        max_length=128,
        description="loss, perplexity or token_accuracy on the held-out rows, or <task>/<metric> of one of evaluation.tasks.",
    )
    max: float | None = Field(default=None, description="The adapter's value must not be above this.")
    min: float | None = Field(default=None, description="The adapter's value must not be below this.")
    better_than_base: bool = Field(
        default=False,
        description="The adapter's value must be better than the base model's: lower for loss and perplexity, higher otherwise. Default: false.",
    )


class EvaluationTask(Spec):
    """A task of the lm-evaluation-harness."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", max_length=100, description="Name of the task, e.g. hellaswag.")
    few_shot: int = Field(default=0, ge=0, le=64, description="Examples in the prompt. Default: 0.")
    limit: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Evaluate on at most this many items. Default: all."
    )


class Evaluation(Spec):
    """How adapter and base model are compared once training ends."""

    gates: list[Gate] = Field(
        default_factory=list,
        max_length=16,
        description="Bars that the adapter must pass. Default: none, every adapter passes. A failed gate does not fail the run: condition "
        "GatePassed is False and AdapterDeployments keep what they serve.",
    )
    tasks: list[EvaluationTask] = Field(
        default_factory=list,
        max_length=16,
        description="Tasks of the lm-evaluation-harness, for base and adapter. Default: none.",
    )
    samples: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(
        default_factory=list,
        max_length=32,
        description="Prompts that base and adapter answer; the answers are kept in the report. Default: none.",
    )


# ---- where and with what it runs -------------------------------------------------------------------------------------


class Resources(Spec):
    """What the training pods ask for."""

    gpus: int = Field(
        default=1,
        ge=0,
        le=16,
        description="GPUs per node. Default: 1. 0 trains on the CPU. A pod that asked for GPUs and sees fewer fails, it never trains slowly on.",
    )
    gpu_resource: str = Field(
        default="nvidia.com/gpu",
        pattern=r"^[a-z0-9][-a-z0-9.]*/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        max_length=128,
        description="Name of the GPU resource on the nodes. Default: nvidia.com/gpu.",
    )
    gpu_memory: Quantity | None = Field(
        default=None,
        description="Memory of one GPU, e.g. 24Gi. With it status.estimate says before a GPU is asked for whether the run fits. Default: unknown.",
    )
    nodes: int = Field(default=1, ge=1, le=64, description="Pods to train with, each with gpus GPUs. Default: 1.")
    cpu: Quantity = Field(default="1", description="CPUs that each pod requests. Default: 1. There is no limit.")
    memory: Quantity | None = Field(
        default=None,
        description="Memory of each pod, request and limit, e.g. 32Gi. Default: 2Gi requested and no limit.",
    )
    shared_memory: Quantity | None = Field(
        default=None,
        description="Size of /dev/shm, for several GPUs in one pod. It counts as memory. Default: that of the container runtime.",
    )


class OutputS3(Spec):
    """The bucket for checkpoints, adapters and reports."""

    uri: S3Uri | None = Field(default=None, description="s3://bucket/prefix. Default: the chart's storage.uri.")
    credentials_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret in this namespace with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Default: the chart's "
        "storage.credentialsSecret, which must then exist in this namespace.",
    )


class OutputHub(Spec):
    """A repository on a hub that the result is pushed to."""

    repo: HubRepo = Field(description="Repository id, e.g. acme/support-bot. Created when absent.")
    content: Literal["Adapter", "Merged"] = Field(
        default="Adapter",
        description="What is pushed, together with the tokenizer: Adapter (default), or the Merged model, which exports must name.",
    )
    private: bool = Field(default=True, description="Whether a new repository is private. Default: true.")
    token_secret_ref: SecretKeyRef = Field(description="Hub token that may write. It reaches the export Job only.")


class Output(Spec):
    """Where the result goes."""

    s3: OutputS3 = Field(default=OutputS3(), description="The bucket. Default: the chart's.")
    exports: list[Literal["Merged", "GGUF"]] = Field(
        default_factory=list,
        max_length=2,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Made from the adapter after training, each with its own digest: Merged (a plain model), GGUF (for llama.cpp). Default: none.",
    )
    merged_precision: Precision = Field(
        default="Auto", description="Type of the weights of the Merged export. Default: Auto, that of the base model."
    )
    hub: OutputHub | None = Field(default=None, description="Push the result to a hub. Default: not pushed.")


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
        description="New attempts after running out of memory, each with half the micro batch and the same effective batch. Default: 3.",
    )


class Budget(Spec):
    """Stop with a checkpoint, reason BudgetExceeded, when the run has used this much. Raise it to go on."""

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
    queue_name: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        max_length=63,
        description="Kueue LocalQueue in this namespace that admits the Jobs. Default: no queue.",
    )
    suspend: bool = Field(
        default=False,
        description="true stops the run with a checkpoint and frees its GPUs; false goes on from there, at no cost of a retry. Default: false.",
    )
    active_deadline: Duration | None = Field(
        default=None,
        description="Longest time of the whole run, e.g. 12h; then it fails with reason DeadlineExceeded. Default: none.",
    )
    ttl_after_finished: Duration | None = Field(
        default=None,
        description="Delete this object that long after it finished, e.g. 72h. What it wrote follows deletionPolicy. Default: never.",
    )
    retry: Retry = Field(default=Retry(), description="How often a run is tried again.")
    budget: Budget | None = Field(default=None, description="What the run may use. Default: no bound.")
    deletion_policy: Literal["Retain", "Delete"] = Field(
        default="Retain",
        description="What happens to checkpoints and adapters in the bucket when this object is deleted. Retain (default), or Delete, which never "
        "removes what another object still names.",
    )


class FineTune(BaseModel):
    """FineTune trains an adapter of a base model and proves what it made."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    api_version: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
    kind: Literal["FineTune"] = "FineTune"
    metadata: ObjectMeta
    spec: FineTuneSpec
    status: FineTuneStatus = FineTuneStatus()
