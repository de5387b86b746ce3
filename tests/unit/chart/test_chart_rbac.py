"""The operator may do what its code does, and nothing else."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_operator import kube

OPERATOR = Path(__file__).resolve().parents[3] / "operator" / "finetune_operator"
Grant = tuple[str, str, str]  # group, resource, verb

# What the methods of Kube ask of the API server. Server-side apply creates what is missing.
VERBS = {
    "get": ["get"],
    "list": ["list"],
    "create": ["create"],
    "apply": ["create", "patch"],
    "replace": ["update"],
    "replace_status": ["update"],
    "patch": ["patch"],
    "delete": ["delete"],
}
RESOURCES = {name: value for name, value in vars(kube).items() if isinstance(value, kube.Resource)}


def grants(documents: list[dict[str, Any]], name: str = "") -> set[Grant]:
    return {
        (group, resource, verb)
        for document in documents
        if document["kind"] in ("Role", "ClusterRole")
        and not document["metadata"]["name"].endswith(("-view", "-edit"))
        and document["metadata"]["name"].startswith(name)
        for rule in document["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def calls() -> Iterator[tuple[str, Grant]]:
    """Every `kube.<method>(RESOURCE, ...)` in the operator's source, as the verbs it needs."""
    for path in sorted(OPERATOR.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            first = node.args[0]
            name = first.id if isinstance(first, ast.Name) else first.attr if isinstance(first, ast.Attribute) else ""
            if node.func.attr in VERBS and name in RESOURCES:
                resource = RESOURCES[name]
                group = resource.api_version.rpartition("/")[0]
                plural = resource.plural + ("/status" if node.func.attr == "replace_status" else "")
                for verb in VERBS[node.func.attr]:
                    yield f"{path.name}:{node.lineno} {node.func.attr}({name})", (group, plural, verb)


# What a plan of serving/ applies and deletes, with a resource that only the plan knows.
PLANNED = {
    (group, resource, verb)
    for group, resource, verbs in (
        ("apps", "deployments", ("create", "patch")),
        ("", "services", ("create", "patch")),
        ("", "configmaps", ("create", "patch", "delete")),
    )
    for verb in verbs
}
WATCHED = {
    (group, resource, verb)
    for group, resource in (
        ("finetune.dev", "finetunes"),
        ("finetune.dev", "adapterdeployments"),
        ("batch", "jobs"),
        ("", "pods"),
        ("apps", "deployments"),
    )
    for verb in ("list", "watch")
}
# blockOwnerDeletion of the children, where the admission plugin OwnerReferencesPermissionEnforcement is on.
OWNERS = {("finetune.dev", f"{plural}/finalizers", "update") for plural in ("finetunes", "adapterdeployments")}


def test_nothing_is_granted_that_the_source_does_not_need(render: Callable[..., list[dict[str, Any]]]) -> None:
    needed = {need for _, need in calls()} | PLANNED | WATCHED | OWNERS
    assert grants(render()) - needed == set()
    assert (PLANNED | WATCHED | OWNERS) - grants(render()) == set()


def test_every_call_in_the_source_is_granted(render: Callable[..., list[dict[str, Any]]]) -> None:
    granted = grants(render())
    found = list(calls())
    assert len(found) > 5
    assert [(where, need) for where, need in found if need not in granted] == []


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["team-a"]}], ids=["cluster", "namespaced"])
def test_there_are_no_secrets_no_wildcards_and_no_writes_to_spec(
    render: Callable[..., list[dict[str, Any]]], values: Any
) -> None:
    granted = grants(render(values))
    assert not [grant for grant in granted if grant[1].startswith("secrets")]
    assert not [grant for grant in granted if "*" in grant]
    kinds = ("finetunes", "adapterdeployments")
    # One write, of metadata.finalizers: finetune/finalizer.py.
    assert {g for g in granted if g[1] in kinds and g[2] not in ("get", "list", "watch")} == {
        ("finetune.dev", "finetunes", "patch")
    }
    written = {where.split()[0] for where, need in calls() if need == ("finetune.dev", "finetunes", "patch")}
    assert {place.partition(":")[0] for place in written} == {"finalizer.py"}
    assert not [g for g in granted if g[1] == "jobs" and g[2] in ("update", "patch")]
    assert not [g for g in granted if g[1].startswith("pods") and g[2] not in ("get", "list", "watch")]


def test_watched_namespaces_get_roles_with_the_same_rules(render: Callable[..., list[dict[str, Any]]]) -> None:
    everywhere = next(
        d for d in render() if d["kind"] == "ClusterRole" and d["metadata"]["name"] == "finetune-operator"
    )
    documents = render({"watchNamespaces": ["team-a", "team-b"]})
    roles = [d for d in documents if d["kind"] == "Role" and d["metadata"]["name"] == "finetune-operator"]
    assert [role["metadata"]["namespace"] for role in roles] == ["team-a", "team-b"]
    assert all(role["rules"] == everywhere["rules"] for role in roles)
    cluster_roles = {d["metadata"]["name"] for d in documents if d["kind"] == "ClusterRole"}
    assert "finetune-operator" not in cluster_roles
    token_review = next(d for d in documents if d["metadata"]["name"] == "finetune-operator-token-review")
    assert token_review["rules"] == [
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
    ]


def test_every_binding_names_a_role_that_exists_and_the_operators_account(
    render: Callable[..., list[dict[str, Any]]],
) -> None:
    for values in ({}, {"watchNamespaces": ["team-a"]}):
        documents = render(values)
        roles = {(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents}
        for binding in documents:
            if binding["kind"] in ("RoleBinding", "ClusterRoleBinding"):
                namespace = binding["metadata"].get("namespace") if binding["roleRef"]["kind"] == "Role" else None
                assert (binding["roleRef"]["kind"], namespace, binding["roleRef"]["name"]) in roles
                assert binding["subjects"] == [
                    {"kind": "ServiceAccount", "name": "finetune-operator", "namespace": "finetune-system"}
                ]


def test_users_with_view_or_edit_get_our_kinds_too(render: Callable[..., list[dict[str, Any]]]) -> None:
    roles = {d["metadata"]["name"]: d for d in render() if d["kind"] == "ClusterRole"}
    view, edit = roles["finetune-operator-view"], roles["finetune-operator-edit"]
    assert view["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"] == "true"
    assert edit["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"
    assert {verb for rule in view["rules"] for verb in rule["verbs"]} == {"get", "list", "watch"}
    assert not [rule for rule in edit["rules"] if any(r.endswith("/status") for r in rule["resources"])]
