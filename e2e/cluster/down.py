"""`make cluster-down`: no process, mount, network namespace, link or cgroup of this clone's cluster stays behind."""

from __future__ import annotations

import shutil
from pathlib import Path

from e2e.cluster import images, sweep
from e2e.cluster.layout import OWNER, STATE
from e2e.cluster.progress import step


def down(any_clone: bool) -> bool:
    """Take the cluster away, with its data if it is this clone's; False when there was none.

    any_clone: also one that another clone of this machine started; that clone's files stay.
    """
    owner = Path(OWNER.read_text()) if OWNER.exists() else None
    if owner and (any_clone or owner == STATE):
        with step(f"stop the cluster of {owner.parent} and remove what it left"):
            sweep.remove(owner)
            OWNER.unlink()
            with images.no_build_running() as idle:
                if idle:
                    sweep.unmount_builds()
    elif not STATE.exists():
        return False
    shutil.rmtree(STATE, ignore_errors=True)
    return True
