"""Which adapter stands behind each name: the one given, or the newest of a FineTune that passed its gates. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from finetune_operator.api.adapterdeployment import Adapter, AdapterDeployment, AdapterDeploymentSpec
from finetune_operator.api.finetune import FineTune
from finetune_operator.api.finetunestatus import AdapterStatus


@dataclass(frozen=True)
class Base:
    """The base model: address, digest where it is known, and the claim to mount when it is on a volume."""

    uri: str
    digest: str = ""
    claim: str = ""
    revision: str = ""
    parameters: int = 0
    remote_code: bool = False


@dataclass(frozen=True)
class Target:
    """The adapter that a name should answer with; with a `refusal` instead, (reason, message), when there is none."""

    name: str
    digest: str = ""
    uri: str = ""
    rank: int = 0
    run_id: str = ""
    base: Base | None = None
    finetune: str = ""
    refusal: tuple[str, str] | None = None

    @property
    def served(self) -> bool:
        """An adapter is known, be it the wanted one or the last good one."""
        return bool(self.digest)


FineTunes = Mapping[str, FineTune]

#: The base model's own name in the engine; the same word as finetune_serving.routes.BASE.
RESERVED_NAME = "base"


def resolve(parent: AdapterDeployment, finetunes: FineTunes) -> list[Target]:
    """One target per adapter of the spec, in its order."""
    targets = [_keep_last_good(parent, _target(parent.spec, adapter, finetunes)) for adapter in parent.spec.adapters]
    base = base_of(parent.spec, targets)
    return [_check_base(target, base) for target in targets]


def base_of(spec: AdapterDeploymentSpec, targets: list[Target]) -> Base | None:
    """The base model that everything is mounted on: the spec's, else that of the first adapter that has one."""
    given = spec.base_model
    if given is None:
        return next((target.base for target in targets if target.base is not None), None)
    # The digest that the adapters were trained on is what the agent checks the given model against.
    digest = next((target.base.digest for target in targets if target.base is not None), "")
    if given.s3 is not None:
        return Base(given.s3.uri, digest, remote_code=given.trust_remote_code)
    if given.persistent_volume_claim is not None:
        claim = given.persistent_volume_claim
        uri = f"file:///data/base-model/{claim.path}".rstrip("/")
        return Base(uri, digest, claim.claim_name, remote_code=given.trust_remote_code)
    return None


def _target(spec: AdapterDeploymentSpec, adapter: Adapter, finetunes: FineTunes) -> Target:
    if adapter.name == RESERVED_NAME:
        message = f"adapters: the name {RESERVED_NAME!r} is the base model's own; choose another"
        return Target(adapter.name, refusal=("ReservedName", message))
    if adapter.artifact is not None:
        return Target(adapter.name, adapter.artifact.digest, adapter.artifact.uri)
    assert adapter.fine_tune_ref is not None, "the CRD wants exactly one of fineTuneRef and artifact"
    return _followed(spec, adapter.name, adapter.fine_tune_ref.name, finetunes.get(adapter.fine_tune_ref.name))


def _followed(spec: AdapterDeploymentSpec, name: str, reference: str, finetune: FineTune | None) -> Target:
    """The newest adapter of a FineTune that passed its gates, or why there is none."""
    nothing = Target(name, finetune=reference)
    if finetune is None:
        return replace(nothing, refusal=("FineTuneNotFound", f"{name}: there is no FineTune {reference!r} here"))
    made = _adapters(finetune)
    passed = [adapter for adapter in made if adapter.gate_passed or spec.gate == "Ignore"]
    if passed:
        refusal = passed[0].merge_refusal if spec.mode == "Merge" else passed[0].mount_refusal
        if refusal:
            return replace(nothing, refusal=("UnsupportedAdapter", f"{name}: {refusal}"))
        return _of_adapter(name, reference, finetune, passed[0])
    if not made:
        phase = finetune.status.phase
        text = f"{name}: FineTune {reference} has no adapter yet, it is {phase}"
        return replace(nothing, refusal=("NoAdapterYet", f"{text}: {finetune.status.message}".rstrip(": ")))
    failed = finetune.status.evaluation.gates if finetune.status.evaluation else []
    why = "; ".join(gate.message or gate.metric for gate in failed if not gate.passed)
    text = f"{name}: no adapter of FineTune {reference} passed its gates" + (f" ({why})" if why else "")
    return replace(nothing, refusal=("GateNotPassed", f"{text}; train again, or set spec.gate: Ignore"))


def _adapters(finetune: FineTune) -> list[AdapterStatus]:
    """Newest first."""
    newest = [finetune.status.adapter] if finetune.status.adapter is not None else []
    return [adapter for adapter in (*newest, *finetune.status.history) if adapter.digest]


def _of_adapter(name: str, reference: str, finetune: FineTune, adapter: AdapterStatus) -> Target:
    claim = finetune.spec.base_model.persistent_volume_claim
    known = finetune.status.base_model
    same = known is not None and known.digest == adapter.base_model_digest
    return Target(
        name,
        adapter.digest,
        adapter.uri,
        adapter.rank,
        adapter.run_id,
        Base(
            adapter.base_model_uri,
            adapter.base_model_digest,
            claim.claim_name if claim is not None and adapter.base_model_uri.startswith("file:") else "",
            known.revision if known is not None and same else "",
            known.parameters if known is not None and same else 0,
            finetune.spec.base_model.trust_remote_code,
        ),
        reference,
    )


def _keep_last_good(parent: AdapterDeployment, target: Target) -> Target:
    """A FineTune that was deleted, or lost its adapters, takes nothing out of service."""
    before = next((adapter for adapter in parent.status.adapters if adapter.name == target.name), None)
    if target.served or before is None or not before.served_digest or parent.status.base_model is None:
        return target
    uri = next((entry.uri for entry in parent.status.history if entry.digest == before.served_digest), "")
    if not uri:
        return target
    base = parent.status.base_model
    return replace(
        target,
        digest=before.served_digest,
        uri=uri,
        run_id=before.run_id,
        base=Base(base.uri, base.digest, "", base.revision, base.parameters),
    )


def in_service(parent: AdapterDeployment, target: Target, base: Base) -> tuple[str, str] | None:
    """Digest and address of the adapter that answers for this name and has to make room for the target's."""
    known = next((adapter for adapter in parent.status.adapters if adapter.name == target.name), None)
    if known is None or known.served_digest in ("", target.digest):
        return None
    before = parent.status.base_model
    if before is not None and (before.uri, before.digest) != (base.uri, base.digest):
        return None  # on another base model, in other pods, which go on with the set that they have
    uri = next((entry.uri for entry in parent.status.history if entry.digest == known.served_digest), "")
    return (known.served_digest, uri) if uri else None


def _check_base(target: Target, base: Base | None) -> Target:
    """All adapters of one deployment were trained on one base model."""
    if target.base is None or base is None or target.base.digest in ("", base.digest) or not base.digest:
        return target
    message = (
        f"{target.name}: its adapter was trained on base model {target.base.digest}, the others on {base.digest}: "
        "give it an AdapterDeployment of its own"
    )
    return Target(target.name, finetune=target.finetune, refusal=("BaseModelMismatch", message))
