"""FineTune spec.evaluation: how the adapter is judged, and what it must pass before it is served."""

from typing import Annotated

from pydantic import Field

from finetune_operator.api.common import Spec
from finetune_operator.api.rules import Rule


class Gate(Spec):
    """A bar that the adapter must pass before an AdapterDeployment serves it."""

    rules = (
        Rule(
            "has(self.max) || has(self.min) || self.betterThanBase",
            "a gate needs a bar: set max, min or betterThanBase",
            reason="FieldValueRequired",
        ),
        Rule(
            "!has(self.max) || !has(self.min) || self.min <= self.max",
            "min: no value passes; min must be at most max",
            field="min",
        ),
    )

    metric: str = Field(
        pattern=r"^(loss|perplexity|token_accuracy|reward_accuracy|reward_margin|"
        r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.+@,-]*)$",
        max_length=128,
        description="On the held-out rows: loss; perplexity or token_accuracy of SFT; reward_accuracy (the share of "
        "pairs whose chosen answer gets the higher reward, of KTO: of answers judged right) or reward_margin (by how "
        "much) of the other objectives. Or <task>/<metric> of one of evaluation.tasks, e.g. hellaswag/acc_norm; with "
        "the filter after a comma where the task has more than one, e.g. gsm8k/exact_match,strict-match.",
    )
    max: float | None = Field(default=None, description="The adapter's value must not be above this.")
    min: float | None = Field(default=None, description="The adapter's value must not be below this.")
    better_than_base: bool = Field(
        default=False,
        description="The adapter's value must be better than the base model's: lower for loss and perplexity, for a "
        "task's metric what the task says, higher otherwise. Default: false.",
    )


class EvaluationTask(Spec):
    """A task of the lm-evaluation-harness: questions of a public data set that base model and adapter answer."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=100,
        description="Name of a task, e.g. hellaswag, or of a group of tasks with a score of its own, e.g. mmlu.",
    )
    few_shot: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Solved examples in front of each question. Default: as many as the task itself says (gsm8k: 5), "
        "otherwise none.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Ask only the first so many questions, of a group: of each of its tasks. Default: all.",
    )


class Evaluation(Spec):
    """How adapter and base model are compared once training ends."""

    rules = (
        Rule(
            "!has(self.gates) || self.gates.all(gate, !gate.metric.contains('/') || "
            "(has(self.tasks) && self.tasks.exists(task, gate.metric.startsWith(task.name + '/'))))",
            "gates: the task of a <task>/<metric> gate must be one of evaluation.tasks; add it there",
            field="gates",
        ),
    )

    gates: list[Gate] = Field(
        default_factory=list,
        max_length=16,
        description="Bars that the adapter must pass. Default: none, every adapter passes. A failed gate does not "
        "fail the run: condition GatePassed is False and AdapterDeployments keep what they serve.",
    )
    tasks: list[EvaluationTask] = Field(
        default_factory=list,
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="Tasks of the lm-evaluation-harness that base model and adapter answer once training ends, without "
        "a chat template. Default: none. Their data is fetched while the run is prepared, without a token.",
    )
    samples: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(
        default_factory=list,
        max_length=32,
        description="Prompts that base and adapter answer; the answers are kept in the report. Default: none.",
    )
