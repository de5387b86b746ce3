"""The safe parts of a pod that users may set: scheduling, labels, image pull secrets, environment."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.common import ObjectName, Spec
from finetune_operator.api.rules import Rule, exactly_one

LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LabelKey = Annotated[str, Field(pattern=LABEL_KEY, max_length=317)]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]


class SelectorRequirement(Spec):
    """One requirement on a label or field."""

    key: str = Field(max_length=317, description="Label key (or field name under matchFields).")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(
        description="How key relates to values."
    )
    values: list[Annotated[str, Field(max_length=253)]] = Field(
        default_factory=list, max_length=32, description="Values to compare with; empty for Exists and DoesNotExist."
    )


class LabelSelector(Spec):
    """Selects objects by their labels; all requirements must hold."""

    match_labels: Labels = Field(default_factory=dict, description="Labels that must be present with these values.")
    match_expressions: list[SelectorRequirement] = Field(
        default_factory=list, max_length=16, description="Requirements on labels."
    )


class NodeSelectorTerm(Spec):
    """Nodes that meet all of these requirements."""

    match_expressions: list[SelectorRequirement] = Field(
        default_factory=list, max_length=16, description="Requirements on the node's labels."
    )
    match_fields: list[SelectorRequirement] = Field(
        default_factory=list, max_length=16, description="Requirements on the node's fields, e.g. metadata.name."
    )


class NodeSelector(Spec):
    """Nodes that meet at least one of the terms."""

    node_selector_terms: list[NodeSelectorTerm] = Field(
        min_length=1, max_length=16, description="One of these terms must hold."
    )


class PreferredNodes(Spec):
    """A preference among nodes."""

    weight: int = Field(ge=1, le=100, description="Added to the score of matching nodes.")
    preference: NodeSelectorTerm = Field(description="The nodes that are preferred.")


class NodeAffinity(Spec):
    """Rules about nodes."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = Field(
        default=None, description="The pod runs on such nodes only."
    )
    preferred_during_scheduling_ignored_during_execution: list[PreferredNodes] = Field(
        default_factory=list, max_length=16, description="Such nodes are preferred."
    )


class PodAffinityTerm(Spec):
    """A place relative to other pods."""

    topology_key: LabelKey = Field(description="Node label that defines a place, e.g. kubernetes.io/hostname.")
    label_selector: LabelSelector | None = Field(default=None, description="The other pods.")
    namespaces: list[ObjectName] = Field(
        default_factory=list,
        max_length=16,
        description="Namespaces of the other pods. Default: this object's namespace.",
    )


class PreferredPods(Spec):
    """A preference for a place relative to other pods."""

    weight: int = Field(ge=1, le=100, description="Added to the score of matching nodes.")
    pod_affinity_term: PodAffinityTerm = Field(description="The place that is preferred (or avoided).")


class PodAffinity(Spec):
    """Rules about the places of other pods."""

    required_during_scheduling_ignored_during_execution: list[PodAffinityTerm] = Field(
        default_factory=list, max_length=16, description="The pod runs in (or outside) these places only."
    )
    preferred_during_scheduling_ignored_during_execution: list[PreferredPods] = Field(
        default_factory=list, max_length=16, description="These places are preferred (or avoided)."
    )


class Affinity(Spec):
    """Where the pods may run, as in a pod's spec.affinity."""

    node_affinity: NodeAffinity | None = Field(default=None, description="Rules about nodes.")
    pod_affinity: PodAffinity | None = Field(default=None, description="Places of other pods to be near to.")
    pod_anti_affinity: PodAffinity | None = Field(default=None, description="Places of other pods to stay away from.")


class Toleration(Spec):
    """A node taint that the pods tolerate, as in a pod's spec.tolerations."""

    rules = (
        Rule(
            "self.operator == 'Exists' || (has(self.key) && self.key != '')",
            "key: operator Equal needs a key; give one or use operator Exists",
            field="key",
            reason="FieldValueRequired",
        ),
        Rule(
            "self.operator == 'Equal' || !has(self.value) || self.value == ''",
            "value: operator Exists compares no value; remove it or use operator Equal",
            field="value",
        ),
    )

    key: str = Field(
        default="", max_length=317, description="Taint key. Default: every key (operator must then be Exists)."
    )
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="Exists or Equal. Default: Equal.")
    value: str = Field(default="", max_length=63, description="Taint value for Equal. Default: the empty value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect. Default: every effect."
    )
    toleration_seconds: int | None = Field(
        default=None, ge=0, le=31_536_000, description="With NoExecute: seconds that the pod stays. Default: for ever."
    )


class KeyRef(Spec):
    """One key of a Secret or ConfigMap in this object's namespace."""

    name: ObjectName = Field(description="Name of the Secret or ConfigMap.")
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253, description="Key that holds the value.")


class EnvVarSource(Spec):
    """Where the value of a variable comes from: exactly one of secretKeyRef and configMapKeyRef."""

    rules = (exactly_one("secretKeyRef", "configMapKeyRef"),)

    secret_key_ref: KeyRef | None = Field(default=None, description="A key of a Secret.")
    config_map_key_ref: KeyRef | None = Field(default=None, description="A key of a ConfigMap.")


class EnvVar(Spec):
    """An environment variable of the main container."""

    rules = (
        Rule(
            "!has(self.valueFrom) || !has(self.value) || self.value == ''",
            "valueFrom: give value or valueFrom, not both",
            field="valueFrom",
        ),
        Rule(
            "!self.name.startsWith('FINETUNE_') && !(self.name in "
            "['AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN', 'HOME', 'PYTHONPATH'])",
            "name: the operator sets this variable itself; remove it",
            field="name",
            reason="FieldValueForbidden",
        ),
    )

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128, description="Name of the variable.")
    value: str = Field(
        default="", max_length=4096, description="Value as text. Default: empty. Secrets belong into valueFrom."
    )
    value_from: EnvVarSource | None = Field(default=None, description="Takes the value from a Secret or ConfigMap.")


class ImagePullSecret(Spec):
    """A Secret with registry credentials."""

    name: ObjectName = Field(description="Name of the Secret, in this object's namespace.")


def _not_ours(field: str) -> Rule:
    return Rule(
        f"!has(self.{field}) || self.{field}.all(key, !key.startsWith('finetune.dev/') && "
        "!key.startsWith('app.kubernetes.io/managed-by') && !key.startsWith('kueue.x-k8s.io/'))",
        f"{field}: finetune.dev/, kueue.x-k8s.io/ and app.kubernetes.io/managed-by are the operator's; remove them",
        field=field,
        reason="FieldValueForbidden",
    )


def _valid_keys(fields: tuple[str, ...]) -> Iterator[Rule]:
    """The keys of a map have no schema of their own in a CRD, so a rule stands in for it."""
    for field in fields:
        yield Rule(
            f"!has(self.{field}) || self.{field}.all(key, key.matches('{LABEL_KEY}'))",
            f"{field}: a key must look like app or example.com/app",
            field=field,
        )


class PodTemplate(Spec):
    """The parts of the pods that users may set. Security settings, volumes and commands are the operator's."""

    rules = (_not_ours("labels"), _not_ours("annotations"), *_valid_keys(("labels", "annotations", "nodeSelector")))

    labels: Labels = Field(default_factory=dict, description="Added to every pod. Our own labels cannot be changed.")
    annotations: Annotated[dict[LabelKey, Annotated[str, Field(max_length=4096)]], Field(max_length=32)] = Field(
        default_factory=dict, description="Added to every pod."
    )
    node_selector: Labels = Field(default_factory=dict, description="Pods run on nodes with all of these labels only.")
    tolerations: list[Toleration] = Field(
        default_factory=list, max_length=32, description="Node taints that the pods tolerate."
    )
    affinity: Affinity | None = Field(default=None, description="Rules about nodes and about other pods.")
    priority_class_name: ObjectName | None = Field(
        default=None,
        description="PriorityClass of the pods. A training pod that is preempted resumes from its checkpoint.",
    )
    runtime_class_name: ObjectName | None = Field(default=None, description="RuntimeClass of the pods, e.g. nvidia.")
    image_pull_secrets: list[ImagePullSecret] = Field(
        default_factory=list, max_length=8, description="Registry credentials. Default: those of the chart."
    )
    service_account_name: ObjectName | None = Field(
        default=None, description="ServiceAccount of the pods. Default: default. Its token is not mounted."
    )
    env: list[EnvVar] = Field(
        default_factory=list,
        max_length=64,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="Environment variables of the main container. The operator's own variables cannot be overridden.",
    )
