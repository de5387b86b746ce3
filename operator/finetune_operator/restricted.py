"""The security context of every pod that we build: what the `restricted` Pod Security profile asks for, and no more rights."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

#: The user of our images.
USER = 10001


def pod() -> Object:
    """`securityContext` of a pod's spec."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        # A big volume is not walked through file by file at every start.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container() -> Object:
    """`securityContext` of a container."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
