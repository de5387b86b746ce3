"""The cluster's network namespace, one veth pair to the host, and the host's routes to pods and services."""

from __future__ import annotations

import ipaddress
import json

from e2e.cluster import shell
from e2e.cluster.layout import (
    HOST_IP,
    LINK_CIDR,
    NETNS,
    NETNS_PATH,
    NODE_IP,
    POD_CIDR,
    SERVICE_CIDR,
    VETH,
)
from e2e.cluster.progress import Refused


def is_up() -> bool:
    return NETNS_PATH.exists() and shell.succeeds("ip", "link", "show", VETH) and _has_routes()


def _has_routes() -> bool:
    routes = shell.output("ip", "route", "show", "dev", VETH)
    return all(cidr in routes for cidr in (POD_CIDR, SERVICE_CIDR)) and shell.succeeds(
        *shell.IN_NAMESPACE, "ip", "route", "get", HOST_IP
    )


def check() -> None:
    """Refuse when one of the cluster's address ranges is already routed elsewhere."""
    routes = json.loads(shell.output("ip", "-json", "-4", "route", "show", "table", "all") or "[]")
    for cidr in (LINK_CIDR, POD_CIDR, SERVICE_CIDR):
        for route in routes:
            if (
                route["dst"] in ("default", VETH)
                or route.get("dev") == VETH
                or route.get("type") in ("broadcast", "local")
            ):
                continue
            if ipaddress.ip_network(cidr).overlaps(ipaddress.ip_network(route["dst"], strict=False)):
                raise Refused(
                    f"the address range {cidr}, which the cluster needs, is taken: `ip route` has {route['dst']}"
                    f" on {route.get('dev', '?')}; take that interface down first"
                )


def up() -> None:
    """Make the namespace and its link anew when any part is missing."""
    down()
    shell.output("ip", "netns", "add", NETNS)
    shell.output("ip", "link", "add", VETH, "type", "veth", "peer", "name", "eth0", "netns", NETNS)
    shell.output("ip", "addr", "add", f"{HOST_IP}/30", "dev", VETH)
    shell.output("ip", "link", "set", VETH, "up")
    inside = [
        "ip link set lo up",
        f"ip addr add {NODE_IP}/30 dev eth0",
        "ip link set eth0 up",
        f"ip route add default via {HOST_IP}",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
    ]
    shell.output(*shell.IN_NAMESPACE, "sh", "-ec", "\n".join(inside))
    for cidr in (POD_CIDR, SERVICE_CIDR):  # so that tests on the host can call pods and services directly
        shell.output("ip", "route", "add", cidr, "via", NODE_IP, "dev", VETH)


def down() -> None:
    if NETNS_PATH.exists():
        shell.output("ip", "netns", "del", NETNS, check=False)
        NETNS_PATH.unlink(missing_ok=True)
    shell.output("ip", "link", "del", VETH, check=False)
