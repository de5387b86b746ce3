"""Objects that the cases apply: the smallest that still do the real thing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from e2e.demo.make_data import training_rows
from e2e.kubectl import Object

API_VERSION = "finetune.dev/v1alpha1"
ROWS = "rows"
TINY = {"s3": {"uri": "s3://models/tiny-llama"}}


def config_map(name: str, namespace: str, files: dict[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace}, "data": files}


def jsonl(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def small_dataset() -> str:
    """Twenty-four rows of the demo's facts."""
    return jsonl(training_rows()[:24])


def from_config_map(name: str = ROWS, key: str = "train.jsonl") -> Object:
    return {"configMap": {"name": name, "key": key}}


def finetune(name: str, namespace: str, seed: int, steps: int = 4, **spec: Any) -> Object:
    """A run of seconds on the ConfigMap `rows`; `spec` replaces whole fields of the spec.

    Another seed is another run: artifacts of an earlier test session are then not reused.
    """
    return {
        "apiVersion": API_VERSION,
        "kind": "FineTune",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "baseModel": TINY,
            "dataset": {"train": from_config_map()},
            "method": {"type": "QLoRA", "lora": {"rank": 8, "alpha": 16}},
            "training": training(seed, steps),
            "resources": resources(),
            **spec,
        },
    }


def training(seed: int, steps: int = 4, **options: Any) -> Object:
    return {
        "maxSteps": steps,
        "batchSize": 4,
        "learningRate": 0.003,
        "maxLength": 128,
        "packing": "Disabled",
        "seed": seed,
        **options,
    }


def resources() -> Object:
    # One pretend GPU, and little enough CPU for several pods on two cores.
    return {"gpus": 1, "cpu": "100m"}


def adapter_deployment(name: str, namespace: str, follows: str, **spec: Any) -> Object:
    """Serves the FineTune `follows` under its own name."""
    return {
        "apiVersion": API_VERSION,
        "kind": "AdapterDeployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "adapters": [{"name": name, "fineTuneRef": {"name": follows}}],
            "resources": resources(),
            **spec,
        },
    }
