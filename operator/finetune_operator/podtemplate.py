"""Puts the safe parts of spec.podTemplate into a pod that we built: what is ours always wins."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.pod import PodTemplate

Object = dict[str, Any]

# Fields of a pod's spec that are taken over as they are.
_AS_IS = ("nodeSelector", "tolerations", "affinity", "priorityClassName", "runtimeClassName", "serviceAccountName")


def merge(template: PodTemplate, pod: Object, container: str) -> Object:
    """`pod` with the user's labels, annotations, scheduling and environment; `container` takes the environment."""
    wanted = template.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    spec = {**pod["spec"], **{name: wanted[name] for name in _AS_IS if name in wanted}}
    # The chart's pull secrets stand in where the user names none.
    secrets = wanted.get("imagePullSecrets") or pod["spec"].get("imagePullSecrets")
    spec.pop("imagePullSecrets", None)
    if secrets:
        spec["imagePullSecrets"] = secrets
    spec["containers"] = [
        {**c, "env": _environment(wanted.get("env", []), c.get("env", []))} if c["name"] == container else c
        for c in pod["spec"]["containers"]
    ]
    meta = pod["metadata"]
    return {
        "metadata": {
            **meta,
            "labels": {**wanted.get("labels", {}), **meta.get("labels", {})},
            "annotations": {**wanted.get("annotations", {}), **meta.get("annotations", {})},
        },
        "spec": spec,
    }


def _environment(theirs: list[Object], ours: list[Object]) -> list[Object]:
    names = {variable["name"] for variable in ours}
    return ours + [variable for variable in theirs if variable["name"] not in names]
