"""What is to be made from a trained adapter: whether anything is asked for, and whether that changed since. Pure."""

from __future__ import annotations

import hashlib

from finetune_operator.api.finetune import FineTuneSpec
from finetune_operator.api.finetunestatus import FineTuneStatus
from finetune_trainer.digest import canonical_json


def asked(spec: FineTuneSpec) -> str:
    """Hash of what spec.output asks to be exported; empty when that is nothing."""
    if not spec.output.exports and spec.output.hub is None:
        return ""
    wanted = spec.output.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"s3"})
    return hashlib.sha256(canonical_json({**wanted, "exports": sorted(spec.output.exports)})).hexdigest()[:16]


def names(spec: FineTuneSpec) -> str:
    """What is asked for, for messages: `Merged, Hub`."""
    return ", ".join([*spec.output.exports, *(["Hub"] if spec.output.hub else [])])


def allowed(status: FineTuneStatus) -> bool:
    """An adapter that did not pass its gates is not passed on."""
    return status.adapter is not None and status.adapter.gate_passed is not False
