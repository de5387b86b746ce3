"""What keeps every pod that we build in its place: what the `restricted` Pod Security profile asks for, and no token."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

#: The user of our images.
USER = 10001


def pod() -> Object:
    """Fields of a pod's spec."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            # A big volume is not walked through file by file at every start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def container() -> Object:
    """`securityContext` of a container."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
