"""Everything that decisions about an AdapterDeployment rest on, gathered once."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from finetune_operator.api.adapterdeployment import AdapterDeployment
from finetune_operator.report import Report
from finetune_operator.serving import observe, targets, workloads
from finetune_operator.serving.targets import Base, FineTunes, Target
from finetune_operator.settings import Settings
from finetune_serving.desired import AgentReport, Desired

Object = dict[str, Any]


@dataclass(frozen=True)
class View:
    """What was seen.

    `taken` names children that exist and belong to somebody else; `silent` are Ready pods without a fresh report;
    `explanations` say by a pod's uid why it does not start, where only Events do.
    """

    parent: AdapterDeployment
    finetunes: FineTunes
    targets: tuple[Target, ...]
    base: Base | None
    deployment: Object | None
    config_map: Object | None
    service: Object | None
    pods: tuple[Object, ...]
    agents: Mapping[str, AgentReport]
    silent: tuple[str, ...]
    explanations: Mapping[str, tuple[str, str]]
    taken: tuple[str, ...]
    settings: Settings
    now: dt.datetime

    @property
    def desired_before(self) -> Desired | None:
        """The desired set that the agents have now."""
        text = ((self.config_map or {}).get("data") or {}).get(workloads.DESIRED_KEY)
        try:
            return Desired.model_validate_json(text) if text else None
        except ValidationError:
            return None  # edited by hand: written anew


def view(
    parent: AdapterDeployment,
    finetunes: FineTunes,
    deployment: Object | None,
    config_map: Object | None,
    service: Object | None,
    pods: Sequence[Object],
    reports: Mapping[str, Report],
    explanations: Mapping[str, tuple[str, str]],
    settings: Settings,
    now: dt.datetime,
) -> View:
    resolved = targets.resolve(parent, finetunes)
    children = {"Deployment": deployment, "ConfigMap": config_map, "Service": service}
    own = {kind: child for kind, child in children.items() if child is not None and _owned(child, parent)}
    living = observe.living(pods)
    agents = observe.agents(reports, living, now)
    return View(
        parent=parent,
        finetunes=finetunes,
        targets=tuple(resolved),
        base=_mounted(targets.base_of(parent.spec, resolved), own.get("Deployment")),
        deployment=own.get("Deployment"),
        config_map=own.get("ConfigMap"),
        service=own.get("Service"),
        pods=tuple(living),
        agents=agents,
        silent=tuple(
            pod["metadata"]["name"] for pod in living if observe.ready(pod) and pod["metadata"]["name"] not in agents
        ),
        explanations=explanations,
        taken=tuple(
            f"{kind} {child['metadata']['name']}" for kind, child in children.items() if child and kind not in own
        ),
        settings=settings,
        now=now,
    )


def _owned(child: Object, parent: AdapterDeployment) -> bool:
    owners = child["metadata"].get("ownerReferences") or []
    return any(owner.get("uid") == parent.metadata.uid for owner in owners)


def _mounted(base: Base | None, deployment: Object | None) -> Base | None:
    """A base on a volume whose FineTune is gone: the claim is the one that the pods mount already."""
    if base is None or base.claim or not base.uri.startswith("file:") or deployment is None:
        return base
    volumes = deployment["spec"]["template"]["spec"].get("volumes") or []
    claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes if v["name"] == "base-model"]
    return replace(base, claim=claims[0]) if claims else base
