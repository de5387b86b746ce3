"""kopf as the source of events, and nothing else: every event becomes a key in the work queue.

Only `on.event`: the other decorators write annotations and finalizers into users' objects, and an edge that they miss
is lost. What must be done is always worked out from the objects as they are (finetune/, serving/).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kopf
from kubernetes.aio.client.configuration import Configuration

from finetune_operator.api.common import GROUP, VERSION
from finetune_operator.context import Context
from finetune_operator.followers import Followers
from finetune_operator.kube import DEPLOYMENTS, JOBS, PODS
from finetune_operator.labels import OWNER_LABEL, SELECTOR
from finetune_operator.queue import Key


def registry(context: Context, followers: Followers, configuration: Configuration) -> kopf.OperatorRegistry:
    """The handlers of all watches."""
    handlers = kopf.OperatorRegistry()
    queue = context.queue

    @kopf.on.login(registry=handlers)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        header = await configuration.get_api_key_with_prefix("BearerToken")
        scheme, token = (header or " ").split(" ", 1)
        return kopf.ConnectionInfo(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            scheme=scheme.capitalize() or None,
            token=token or None,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )

    @kopf.on.event(GROUP, VERSION, "finetunes", registry=handlers)
    async def finetune(type: str | None, body: kopf.Body, namespace: str | None, name: str, **_: Any) -> None:
        key = Key("FineTune", namespace or "", name)
        if type == "DELETED":
            changed = followers.finetune_gone(key)
        else:
            changed = followers.finetune_seen(key, dict(body))
            if not body.get("status"):
                context.newborn[key] = dict(body)
        if not context.is_own_write(type, body["metadata"]):
            queue.add(key)
        for deployment in changed:
            queue.add(deployment)

    @kopf.on.event(GROUP, VERSION, "adapterdeployments", registry=handlers)
    async def adapterdeployment(type: str | None, body: kopf.Body, namespace: str | None, name: str, **_: Any) -> None:
        key = Key("AdapterDeployment", namespace or "", name)
        if type == "DELETED":
            followers.deployment_gone(key)
        else:
            followers.deployment_seen(key, dict(body))
        queue.add(key)

    async def child(
        type: str | None, body: kopf.Body, namespace: str | None, labels: Mapping[str, str], **_: Any
    ) -> None:
        if context.is_own_write(type, body["metadata"]):
            return
        for kind, label in OWNER_LABEL.items():
            if label in labels:
                queue.add(Key(kind, namespace or "", labels[label]))

    for resource in (JOBS, PODS, DEPLOYMENTS):
        kopf.on.event(*_address(resource.api_version), resource.plural, registry=handlers, id=resource.plural)(child)
    return handlers


class NothingToCompare(kopf.DiffBaseStorage):
    """kopf works out what changed in every object for handlers that we do not have: 1 ms of copying per event."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


def settings() -> kopf.OperatorSettings:
    """kopf told to write nothing, to scan nothing and to let the API server filter."""
    chosen = kopf.OperatorSettings()
    chosen.scanning.disabled = True  # no list of namespaces and CRDs: fewer rights
    chosen.posting.enabled = False  # events.py posts ours
    chosen.persistence.finalizer = f"{GROUP}/finalizer"
    chosen.persistence.diffbase_storage = NothingToCompare()
    for resource in (JOBS, PODS, DEPLOYMENTS):
        chosen.watching.label_selectors[(*_address(resource.api_version), resource.plural)] = SELECTOR
    return chosen


def _address(api_version: str) -> tuple[str, str]:
    group, _, version = api_version.rpartition("/")
    return group, version
