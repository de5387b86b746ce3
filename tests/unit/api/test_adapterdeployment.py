"""What the types make of an AdapterDeployment."""

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_operator.api import AdapterDeployment

FOLLOWED = {"name": "support-bot", "fineTuneRef": {"name": "support-bot"}}


def deployment(**spec: Any) -> AdapterDeployment:
    return AdapterDeployment.model_validate({"metadata": {"name": "bot"}, "spec": {"adapters": [FOLLOWED]} | spec})


def test_a_minimal_deployment_mounts_one_pod_behind_a_required_gate() -> None:
    spec = deployment().spec
    assert (spec.mode, spec.replicas, spec.gate, spec.service.type) == ("Mount", 1, "Required", "ClusterIP")
    assert (spec.resources.gpus, spec.base_model, spec.autoscaling) == (1, None, None)


def test_an_adapter_is_named_by_its_whole_digest() -> None:
    short = {"name": "pinned", "artifact": {"uri": "s3://finetune/adapters/x", "digest": "sha256:3f9a1c20b7de"}}
    with pytest.raises(ValidationError, match="artifact.digest"):
        deployment(adapters=[short])


def test_a_model_name_cannot_look_like_a_digest_name() -> None:
    with pytest.raises(ValidationError, match="adapters.0.name"):
        deployment(adapters=[FOLLOWED | {"name": "support-bot@3f9a1c20b7de"}])


def test_a_deployment_without_adapters_is_refused() -> None:
    with pytest.raises(ValidationError, match="adapters"):
        deployment(adapters=[])
