"""A thin asynchronous client of the Kubernetes API: plain dicts in, plain dicts out.

The official client supplies authentication, TLS and token refresh. Its typed models are left aside on purpose: they
refuse fields newer than themselves and decode a long list 20 times slower than JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from finetune_operator import metrics
from finetune_operator.api.common import GROUP, VERSION

FIELD_MANAGER = "finetune-operator"
READ_SECONDS = 30.0
# A write that began just before the lease was lost must have ended before another leader may begin: see leader.py.
WRITE_SECONDS = 4.0

Object = dict[str, Any]


class ApiError(Exception):
    """An answer of the API server that is not 2xx; `status` is 0 when no answer came at all."""

    def __init__(self, request: str, status: int, reason: str, message: str) -> None:
        super().__init__(f"{request}: {status or 'no answer'} {reason}: {message}".strip())
        self.status, self.reason, self.message = status, reason, message

    @property
    def already_exists(self) -> bool:
        return self.status == 409 and self.reason == "AlreadyExists"

    @property
    def conflict(self) -> bool:
        """Somebody else wrote the object since it was read."""
        return self.status == 409 and self.reason != "AlreadyExists"

    @property
    def namespace_ending(self) -> bool:
        """The namespace is being deleted: nothing new can be in it, and everything in it goes."""
        return self.status == 403 and "because it is being terminated" in self.message

    @property
    def refused(self) -> bool:
        """The request itself is at fault (invalid, forbidden by quota or policy); sending it again changes nothing."""
        return self.status in (400, 403, 413, 422)


@dataclass(frozen=True)
class Resource:
    """Where one kind lives in the API; `api_version` is `v1` or `group/version`."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        root = "/api/" if "/" not in self.api_version else "/apis/"
        middle = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return f"{root}{self.api_version}{middle}/{self.plural}" + "".join(f"/{p}" for p in (name, subresource) if p)


FINETUNES = Resource(f"{GROUP}/{VERSION}", "FineTune", "finetunes")
ADAPTERDEPLOYMENTS = Resource(f"{GROUP}/{VERSION}", "AdapterDeployment", "adapterdeployments")
JOBS = Resource("batch/v1", "Job", "jobs")
PODS = Resource("v1", "Pod", "pods")
DEPLOYMENTS = Resource("apps/v1", "Deployment", "deployments")
SERVICES = Resource("v1", "Service", "services")
CONFIGMAPS = Resource("v1", "ConfigMap", "configmaps")
HORIZONTALPODAUTOSCALERS = Resource("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
SCALEDOBJECTS = Resource("keda.sh/v1alpha1", "ScaledObject", "scaledobjects")
LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")
EVENTS = Resource("events.k8s.io/v1", "Event", "events")
CORE_EVENTS = Resource("v1", "Event", "events")  # the same objects; this version can be filtered by the object's uid
ENDPOINTSLICES = Resource("discovery.k8s.io/v1", "EndpointSlice", "endpointslices")
TOKENREVIEWS = Resource("authentication.k8s.io/v1", "TokenReview", "tokenreviews", namespaced=False)


async def configuration(kubeconfig: str | None = None) -> Configuration:
    """From this file; without one in a pod its service account, elsewhere $KUBECONFIG or ~/.kube/config."""
    loaded = Configuration()
    if kubeconfig is None:
        try:
            config.load_incluster_config(client_configuration=loaded)  # type: ignore[no-untyped-call]
            return loaded
        except config.ConfigException:
            pass
    await config.load_kube_config(kubeconfig, client_configuration=loaded)  # type: ignore[no-untyped-call]
    return loaded


class Kube:
    """One object per process, or two that share a client: the lease's own, and the fenced one for everything else."""

    def __init__(self, client: ApiClient, fence: Callable[[], None] | None = None) -> None:
        """`fence` is called before every write and raises when this process may no longer write."""
        self._client = client
        self._fence = fence

    async def get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """The object, or None when there is none."""
        try:
            return await self._object("GET", resource.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(
        self,
        resource: Resource,
        namespace: str = "",
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> list[Object]:
        """All objects with these labels and fields; items get the `kind` and `apiVersion` that a list leaves out."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        selectors = {name: ",".join(f"{k}={v}" for k, v in wanted.items()) for name, wanted in query.items() if wanted}
        answer = await self._request("GET", resource.path(namespace), selectors)
        return [{"apiVersion": resource.api_version, "kind": resource.kind, **item} for item in answer["items"]]

    async def kinds(self, api_version: str) -> set[str]:
        """The kinds that the API server knows in a group's version; empty when it does not know the group."""
        try:
            answer = await self._request("GET", f"/apis/{api_version}")
        except ApiError as error:
            if error.status == 404:
                return set()
            raise
        return {resource["kind"] for resource in answer["resources"]}

    async def create(self, resource: Resource, body: Object) -> Object:
        """POST; an ApiError with `already_exists` when the name is taken."""
        namespace = body.get("metadata", {}).get("namespace", "")
        return await self._object("POST", resource.path(namespace), body=body)

    async def apply(self, resource: Resource, body: Object) -> Object:
        """Server-side apply of the fields in `body`, taking them over from any other field manager."""
        meta = body["metadata"]
        return await self._object(
            "PATCH",
            resource.path(meta["namespace"], meta["name"]),
            {"fieldManager": FIELD_MANAGER, "force": "true"},
            body,
            "application/apply-patch+yaml",
        )

    async def replace(self, resource: Resource, body: Object) -> Object:
        """PUT; a conflict when `metadata.resourceVersion` in the body is not the newest."""
        meta = body["metadata"]
        return await self._object("PUT", resource.path(meta.get("namespace", ""), meta["name"]), body=body)

    async def replace_status(self, resource: Resource, parent: Object, status: Object) -> Object:
        """Write the whole status of `parent` as it was read; a conflict when somebody wrote it since.

        PUT and not a patch: fields that are gone from `status` go, and the resource version is always compared.
        """
        meta = parent["metadata"]
        body = {**parent, "apiVersion": resource.api_version, "kind": resource.kind, "status": status}
        return await self._object("PUT", resource.path(meta["namespace"], meta["name"], "status"), body=body)

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Sequence[Object] | Object) -> Object:
        """JSON patch (a list of operations) or JSON merge patch (an object)."""
        kind = "application/merge-patch+json" if isinstance(patch, dict) else "application/json-patch+json"
        return await self._object("PATCH", resource.path(namespace, name), body=patch, content_type=kind)

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str = "") -> bool:
        """Delete with everything it owns, in the background; False when it was gone (or is another object than `uid`)."""
        body: Object = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            await self._request("DELETE", resource.path(namespace, name), body=body)
        except ApiError as error:
            if error.status == 404 or error.conflict:
                return False
            raise
        return True

    async def _object(self, *request: Any, **options: Any) -> Object:
        answer: Object = await self._request(*request, **options)
        return answer

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Any:
        writes = method != "GET"
        if writes and self._fence is not None:
            self._fence()
        settings = self._client.configuration
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": FIELD_MANAGER}
        bearer = (await settings.auth_settings()).get("BearerToken")
        if bearer and bearer["value"]:
            headers["Authorization"] = bearer["value"]
        url = settings.host + path + (f"?{urlencode(query)}" if query else "")
        request = f"{method} {path}"
        try:
            response = await self._client.rest_client.request(  # type: ignore[no-untyped-call]
                method, url, headers=headers, body=body, _request_timeout=WRITE_SECONDS if writes else READ_SECONDS
            )
            raw = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            metrics.api_requests.labels(method, "0").inc()
            raise ApiError(request, 0, type(error).__name__, str(error) or "the API server did not answer") from error
        metrics.api_requests.labels(method, str(response.status)).inc()
        if response.status >= 300:
            raise _api_error(request, response.status, raw)
        return json.loads(raw)


def _api_error(request: str, status: int, raw: bytes) -> ApiError:
    try:
        answer = json.loads(raw)
        return ApiError(request, status, answer.get("reason", ""), answer.get("message", ""))
    except (ValueError, AttributeError):
        # Proxies and the API server's own filters (429, 503) answer in plain text.
        return ApiError(request, status, "", raw[:200].decode(errors="replace").strip())
