"""What in the bucket belongs to one FineTune alone: runs, adapters and exports that no other object names. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.finetune import FineTune
from finetune_operator.api.finetunestatus import AdapterStatus, FineTuneStatus, RunStatus

Object = dict[str, Any]

#: On a FineTune whose artifacts are to be deleted with it, and on no other.
FINALIZER = "finetune.dev/artifacts"


@dataclass(frozen=True)
class Artifacts:
    """Folders to delete, and those that stay because somebody else names them, with who that is."""

    delete: tuple[str, ...]
    kept: tuple[str, ...] = ()


def artifacts(
    parent: FineTune, storage_uri: str, finetunes: Iterable[Object], deployments: Iterable[Object]
) -> Artifacts:
    """`finetunes` and `deployments`: all that the operator sees, as stored; `parent` itself may be among them."""
    named = _named(parent, finetunes, deployments)
    delete, kept = [], []
    for uri, identity in _folders(parent.status, storage_uri):
        if identity in named:
            kept.append(f"{uri} ({named[identity]})")
        else:
            delete.append(uri)
    return Artifacts(tuple(delete), tuple(kept))


def _folders(status: FineTuneStatus, storage_uri: str) -> dict[tuple[str, str], None]:
    """(address, run id or digest) of all that the status knows, in a set that keeps its order."""
    found: dict[tuple[str, str], None] = {}
    if status.run is not None and status.run.id:
        found[f"{storage_uri.rstrip('/')}/runs/{status.run.id}", status.run.id] = None
    for adapter in _adapters(status):
        hexadecimal = adapter.digest.removeprefix("sha256:")
        root, _, folder = adapter.uri.rpartition("/adapters/")
        if not hexadecimal or folder != hexadecimal:
            continue  # not a folder that a run made
        if adapter.run_id:
            found[f"{root}/runs/{adapter.run_id}", adapter.run_id] = None
        found[adapter.uri, adapter.digest] = None
    for export in status.exports:
        if export.type != "Hub" and export.uri:
            found[export.uri, export.digest] = None
    return found


def _adapters(status: FineTuneStatus) -> list[AdapterStatus]:
    return [*([status.adapter] if status.adapter is not None else []), *status.history]


def _named(parent: FineTune, finetunes: Iterable[Object], deployments: Iterable[Object]) -> dict[str, str]:
    """Run ids and digests that others name: which object does."""
    found: dict[str, str] = {}
    for item in finetunes:
        meta, status = item["metadata"], FineTuneStatus.model_validate(item.get("status") or {})
        if meta["uid"] == parent.metadata.uid or _goes_with_its_artifacts(meta):
            continue
        names = _ids(status)
        if _prepares_the_same(status.run, parent.status.run):
            names |= _ids(parent.status)
        found |= dict.fromkeys(names, f"FineTune {meta['namespace']}/{meta['name']} names it")
    for item in deployments:
        meta = item["metadata"]
        if not meta.get("deletionTimestamp"):
            who = f"AdapterDeployment {meta['namespace']}/{meta['name']} names it"
            found |= dict.fromkeys(_served(parent, item), who)
    return found


def _prepares_the_same(run: RunStatus | None, own: RunStatus | None) -> bool:
    """It may find the run and its adapter in the bucket."""
    return run is not None and own is not None and not run.id and run.inputs == own.inputs


def _goes_with_its_artifacts(meta: Object) -> bool:
    """Two that are deleted at once must not keep each other's artifacts."""
    return bool(meta.get("deletionTimestamp")) and FINALIZER in (meta.get("finalizers") or [])


def _served(parent: FineTune, deployment: Object) -> set[str]:
    """Digests that an AdapterDeployment asks for or answers with."""
    digests: set[str] = set()
    for adapter in deployment["spec"].get("adapters") or []:
        digests.add((adapter.get("artifact") or {}).get("digest", ""))
        followed = (adapter.get("fineTuneRef") or {}).get("name")
        here = deployment["metadata"]["namespace"] == parent.metadata.namespace
        if here and followed == parent.metadata.name and parent.status.adapter is not None:
            digests.add(parent.status.adapter.digest)
    for adapter in (deployment.get("status") or {}).get("adapters") or []:
        digests |= {adapter.get("desiredDigest", ""), adapter.get("servedDigest", "")}
    return digests


def _ids(status: FineTuneStatus) -> set[str]:
    made = {text for adapter in _adapters(status) for text in (adapter.run_id, adapter.digest)}
    return {*made, *(export.digest for export in status.exports), status.run.id if status.run is not None else ""}
