"""`make cluster-down`: no process, mount, network namespace, link or cgroup of this clone's cluster stays behind."""

from __future__ import annotations

import shutil
from pathlib import Path

from e2e.cluster import images, sweep
from e2e.cluster.layout import OWNER, STATE
from e2e.cluster.progress import step


def down() -> bool:
    """Take this clone's cluster away, with its data; False when there was none."""
    owner = Path(OWNER.read_text()) if OWNER.exists() else None
    if owner != STATE and not STATE.exists():
        return False
    with step("stop the cluster and remove what it left"):
        if owner == STATE:
            sweep.remove(STATE)
            OWNER.unlink()
        with images.no_build_running() as idle:
            if idle:
                sweep.unmount_builds()
        shutil.rmtree(STATE, ignore_errors=True)
    return True
