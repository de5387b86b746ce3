"""The address of the report server: an EndpointSlice that points the selector-less Service at the leader's pod."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass

from finetune_operator.kube import ENDPOINTSLICES, SERVICES, Kube, Object
from finetune_operator.labels import MANAGER

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where this process runs; `ip` is empty outside a cluster."""

    namespace: str
    pod: str
    pod_uid: str = ""
    ip: str = ""


def endpoint_slice(service: Object, place: Place, port: int) -> Object:
    """The slice with this pod as its only endpoint."""
    meta = service["metadata"]
    family = f"IPv{ipaddress.ip_address(place.ip).version}"
    return {
        "apiVersion": ENDPOINTSLICES.api_version,
        "kind": ENDPOINTSLICES.kind,
        "metadata": {
            "namespace": meta["namespace"],
            # addressType is immutable, so each family has a slice of its own.
            "name": f"{meta['name']}-{family.lower()}",
            "labels": {
                "kubernetes.io/service-name": meta["name"],
                "endpointslice.kubernetes.io/managed-by": MANAGER,
            },
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": meta["name"], "uid": meta["uid"]}],
        },
        "addressType": family,
        "endpoints": [
            {
                "addresses": [place.ip],
                "conditions": {"ready": True},
                "targetRef": {"kind": "Pod", "namespace": place.namespace, "name": place.pod, "uid": place.pod_uid},
            }
        ],
        # kube-proxy joins Service and slice by the name of the port.
        "ports": [{"name": service["spec"]["ports"][0].get("name", ""), "port": port, "protocol": "TCP"}],
    }


async def announce(kube: Kube, place: Place, service: str, port: int) -> None:
    """Send the pods' reports to this process."""
    if not place.ip:
        log.info("no POD_IP: outside a cluster, the report server is not announced")
        return
    found = await kube.get(SERVICES, place.namespace, service)
    if found is None:
        log.error("Service %s/%s is missing: pods cannot report; install it with the chart", place.namespace, service)
        return
    await kube.apply(ENDPOINTSLICES, endpoint_slice(found, place, port))
    log.info("reports for Service %s go to %s:%s", service, place.ip, port)
