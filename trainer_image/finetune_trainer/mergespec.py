"""The contract of the merge step, which serves an adapter as a plain model: what it is told and what it leaves.

pydantic and the standard library only; the operator writes the spec into the pod's annotation.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_operator.api.common import Spec, Status
from finetune_trainer.runspec import Failure, Storage


class MergeSpec(Spec):
    """One base model and one adapter, to be merged into `target`."""

    name: str
    storage: Storage
    base_uri: str
    base_digest: str = ""
    adapter_uri: str
    adapter_digest: str
    #: Auto: bfloat16, but float32 on a CPU that only emulates bfloat16 and is to serve the model.
    precision: Literal["Auto", "BF16", "FP16", "FP32"] = "Auto"
    gpus: int = 0
    min_logprob_delta: float = 0.001
    prompts: list[str] = Field(default_factory=list)
    trust_remote_code: bool = False
    #: A reward model may be merged too: to be exported, never to be served.
    exported: bool = False


class MergeResult(Status):
    """The termination message: what was measured, or why it failed."""

    adapter_digest: str = ""
    #: What was compared: a language model's logits, or a reward model's scores.
    compared: Literal["logits", "scores"] = "logits"
    #: Largest absolute difference of a logit between the merged model and base plus mounted adapter.
    logit_difference: float | None = None
    tolerance: float | None = None
    #: Mean difference in log probability to the base model.
    logprob_delta: float | None = None
    dtype: str = ""
    failure: Failure | None = None
