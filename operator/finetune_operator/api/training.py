"""FineTune spec.training and spec.checkpoint: the training loop and when its state is saved."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, model_validator

from finetune_operator.api.common import Precision, Spec
from finetune_operator.api.rules import Rule

# TRL's examples with LoRA for SFT and DPO (trl/scripts), which KTO and ORPO share; its default for Reward.
LEARNING_RATES = {"SFT": 2e-4, "DPO": 5e-6, "KTO": 5e-6, "ORPO": 5e-6, "Reward": 1e-4}


class EarlyStopping(Spec):
    """Stop when the evaluation loss no longer falls, and keep the best checkpoint."""

    patience: int = Field(
        default=3,
        ge=1,
        le=100,
        description="Stop after this many evaluations (one per checkpoint) without a lower loss. Default: 3.",
    )


MicroBatchSize = Annotated[
    Annotated[int, Field(strict=True, ge=1, le=4096)] | Literal["auto"],
    WithJsonSchema(
        {"x-kubernetes-int-or-string": True, "pattern": "^auto$", "minimum": 1, "maximum": 4096, "maxLength": 4}
    ),
]


class Training(Spec):
    """The training loop."""

    rules = (
        Rule(
            "!has(self.epochs) || !has(self.maxSteps)",
            "maxSteps: give epochs or maxSteps, not both",
            field="maxSteps",
            reason="FieldValueForbidden",
        ),
    )

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
        default_factory=lambda: LEARNING_RATES["SFT"],  # in the CRD it has no default: it depends on objective.type
        gt=0,
        le=10,
        description="Peak learning rate. Default: 0.0002 for SFT (adapters want more than full fine-tuning: 1e-4 to "
        "2e-4), 0.0001 for Reward, 0.000005 for DPO, KTO and ORPO.",
    )
    scheduler: Literal[
        "Linear", "Cosine", "CosineWithRestarts", "Polynomial", "Constant", "ConstantWithWarmup", "InverseSqrt"
    ] = Field(
        default="Cosine",
        description="How the learning rate moves after the warm-up. Default: Cosine, down to zero. CosineWithRestarts: one "
        "cycle per epoch. Linear: down to zero. Polynomial: as the square of Linear. InverseSqrt: as the root of warm-up "
        "steps over steps. ConstantWithWarmup: stays; Constant has no warm-up either.",
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
        description="Optimizer. Default: adamw_torch. paged_adamw_32bit and paged_adamw_8bit move their state to host "
        "memory when the GPU is full; the 8bit ones need a quarter of the state's memory. adafactor takes learningRate as "
        "it is (no scaling by a weight's size); sgd has no momentum.",
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        le=65536,
        description="Samples per optimizer step, over all GPUs and nodes: the effective batch. Default: 16. It never "
        "changes by itself; accumulation steps are batchSize / (microBatchSize x GPUs).",
    )
    micro_batch_size: MicroBatchSize = Field(
        default="auto",
        description="Samples that one GPU computes at once, or auto (default): the largest that fits by the memory "
        "estimate. It changes speed and memory; of the result only which noise dropout draws.",
    )
    max_length: int = Field(
        default=1024, ge=16, le=1_048_576, description="Longest sample in tokens. Default: 1024. See dataset.onTooLong."
    )
    packing: Literal["Auto", "Enabled", "Disabled"] = Field(
        default="Auto",
        description="Put several short samples into one row of maxLength tokens, without letting them see each other: "
        "several times faster. Auto (default): enabled for SFT, disabled otherwise. When enabled a row counts as one "
        "sample of batchSize.",
    )
    loss_on: Literal["Completion", "All"] = Field(
        default="Completion",
        description="Tokens that are learned. Completion (default): answers and assistant turns only. All: prompts "
        "too. Text rows have no prompt and are learned whole.",
    )
    gradient_checkpointing: Literal["Auto", "Enabled", "Disabled"] = Field(
        default="Auto",
        description="Compute activations twice instead of keeping them: much less memory, about a quarter slower. "
        "Auto (default): only when the memory estimate says that it is needed.",
    )
    precision: Precision = Field(
        default="Auto",
        description="Type for computing. Auto (default): BF16 where the hardware has instructions for it, otherwise "
        "FP32.",
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


EVERY_PATTERN = r"^(([0-9]{1,6}(s|m|h))+|epoch)$"
CheckpointEvery = Annotated[
    Annotated[int, Field(strict=True, ge=1, le=10_000_000)]
    | Annotated[str, Field(pattern=EVERY_PATTERN, max_length=32)],
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "pattern": EVERY_PATTERN,
            "minimum": 1,
            "maximum": 10_000_000,
            "maxLength": 32,
        }
    ),
]


class Checkpoint(Spec):
    """When the state of the run is saved to the bucket. A run that is interrupted goes on from there."""

    rules = (
        Rule(
            "!has(self.every) || type(self.every) == int || self.every == 'epoch' || "
            "duration(self.every) >= duration('10s')",
            "every: at least 10s, or a number of steps, or epoch",
            field="every",
        ),
    )

    every: CheckpointEvery = Field(
        default="10m",
        description="Time such as 10m (default), a number of steps, or epoch. A pod that is told to stop saves one in "
        "any case.",
    )
    keep: int = Field(
        default=2, ge=1, le=100, description="Newest checkpoints that are kept in the bucket. Default: 2."
    )
