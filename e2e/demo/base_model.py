"""tiny-llama from the cache; made once, and again only when its maker changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from e2e.cluster.layout import CACHE
from e2e.cluster.progress import Refused, say, step

MAKER = Path(__file__).with_name("make_model.py")
FOLDER = CACHE / "models" / "tiny-llama"
KEY = CACHE / "models" / "tiny-llama.key"


def base_model() -> Path:
    """The model's folder."""
    key = hashlib.sha256(MAKER.read_bytes()).hexdigest()
    if FOLDER.is_dir() and KEY.exists() and KEY.read_text() == key:
        say(f"  base model tiny-llama: from the cache ({FOLDER})")
        return FOLDER
    unfinished = FOLDER.with_name(f"tiny-llama.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with step("base model tiny-llama: making it, once for this machine"):
        done = subprocess.run([sys.executable, str(MAKER), str(unfinished)], check=False)
    if done.returncode:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise Refused(f"the base model could not be made; its maker's output is above. Again: python {MAKER} FOLDER")
    KEY.unlink(missing_ok=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    unfinished.rename(FOLDER)
    KEY.write_text(key)
    return FOLDER
