"""Who sends a report: TokenReview of the pod's bound service-account token, then the pod itself is looked at."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from finetune_operator.kube import PODS, TOKENREVIEWS, Kube, Object
from finetune_operator.labels import OWNER_LABEL, first_of_its_job
from finetune_operator.labels import REPORT_AUDIENCE as AUDIENCE
from finetune_operator.queue import Key

# A review is good for this long: short enough that a deleted pod's token dies soon, long enough that a pod which
# reports every 5 s costs one review in 24 reports.
CACHE_SECONDS = 120.0
CACHE_ENTRIES = 4096


class Refused(Exception):
    """A report that is not taken, with the HTTP status to answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Sender:
    """The pod behind a token; `owners` are the objects its labels name; `job` owns the pod (empty if no Job does)."""

    namespace: str
    pod: str
    pod_uid: str
    owners: frozenset[Key]
    job: str = ""
    job_uid: str = ""
    leads: bool = True  # of the several pods of a Job only the first one speaks for it


@dataclass(frozen=True)
class _Entry:
    sender: Sender
    until: float


class Tokens:
    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._cache: OrderedDict[str, _Entry] = OrderedDict()

    async def sender(self, authorization: str) -> Sender:
        """The pod that holds this bearer token; Refused (401, 403) when it is no pod's token made for us."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refused(401, "send the projected service-account token as `Authorization: Bearer <token>`")
        key = hashlib.sha256(token.encode()).hexdigest()
        entry = self._cache.get(key)
        if entry is not None and entry.until > time.monotonic():
            return entry.sender
        sender = await self._from_pod(await self._review(token))
        self._cache[key] = _Entry(sender, time.monotonic() + CACHE_SECONDS)
        self._cache.move_to_end(key)
        if len(self._cache) > CACHE_ENTRIES:
            self._cache.popitem(last=False)
        return sender

    def check(self, sender: Sender, key: Key) -> None:
        """Refused (403) unless the pod belongs to the object that the report is about."""
        if key not in sender.owners:
            raise Refused(403, f"pod {sender.namespace}/{sender.pod} does not belong to {key}")
        if key.kind == "FineTune" and not sender.job:
            raise Refused(403, f"pod {sender.namespace}/{sender.pod} belongs to no Job")
        if not sender.leads:
            raise Refused(
                403, f"pod {sender.namespace}/{sender.pod} is not the first of Job {sender.job}, which reports"
            )

    async def _review(self, token: str) -> Sender:
        answer = await self._kube.create(
            TOKENREVIEWS,
            {
                "apiVersion": TOKENREVIEWS.api_version,
                "kind": TOKENREVIEWS.kind,
                "spec": {"token": token, "audiences": [AUDIENCE]},
            },
        )
        status = answer.get("status", {})
        # An API server that knows no audiences answers without any: then the token was not checked for ours.
        if not status.get("authenticated") or AUDIENCE not in status.get("audiences", []):
            raise Refused(401, f"the token is not valid for audience {AUDIENCE}")
        user = status.get("user", {})
        extra = user.get("extra", {})
        pod = _first(extra, "authentication.kubernetes.io/pod-name")
        uid = _first(extra, "authentication.kubernetes.io/pod-uid")
        parts = user.get("username", "").split(":")
        if not pod or not uid or parts[:2] != ["system", "serviceaccount"] or len(parts) != 4:
            raise Refused(403, "the token is not bound to a pod; use a projected serviceAccountToken volume")
        return Sender(namespace=parts[2], pod=pod, pod_uid=uid, owners=frozenset())

    async def _from_pod(self, sender: Sender) -> Sender:
        pod = await self._kube.get(PODS, sender.namespace, sender.pod)
        if pod is None or pod["metadata"].get("uid") != sender.pod_uid:
            raise Refused(403, f"pod {sender.namespace}/{sender.pod} is gone")
        return _with_owners(sender, pod)


def _with_owners(sender: Sender, pod: Object) -> Sender:
    labels = pod["metadata"].get("labels", {})
    owners = frozenset(
        Key(kind, sender.namespace, labels[label]) for kind, label in OWNER_LABEL.items() if labels.get(label)
    )
    controller: Object = next((o for o in pod["metadata"].get("ownerReferences", []) if o.get("controller")), {})
    if controller.get("kind") == "Job":
        leads = first_of_its_job(pod)
        return replace(sender, owners=owners, job=controller["name"], job_uid=controller["uid"], leads=leads)
    return replace(sender, owners=owners)


def _first(extra: Object, key: str) -> str:
    values = extra.get(key) or [""]
    return str(values[0])
