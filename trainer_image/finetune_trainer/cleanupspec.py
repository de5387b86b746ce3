"""The contract of the clean-up step, which deletes what a FineTune alone owns: what it is told and what it leaves.

pydantic and the standard library only; the operator writes the spec into the pod's annotation.
"""

from __future__ import annotations

from pydantic import Field

from finetune_operator.api.common import Spec, Status
from finetune_trainer.runspec import Failure, Storage

#: The only folders that may be deleted: a run, or an adapter or an export by its digest.
DELETABLE = r"^s3://[^/]+(/[^/]+)*/(runs/[0-9a-f]{12,64}|(adapters|merged|gguf)/[0-9a-f]{64})$"


class CleanupSpec(Spec):
    """Folders to delete."""

    storage: Storage
    uris: list[str] = Field(min_length=1)


class CleanupResult(Status):
    """The termination message: how many objects were deleted, or why not all."""

    objects: int = 0
    failure: Failure | None = None
