"""`make demo` on the cluster under test, twice: the second run uses what the first has made."""

from __future__ import annotations

import re
import subprocess
import sys
import time

from e2e.cluster.layout import REPO
from e2e.kubectl import Kubectl


def run_demo(kubectl: Kubectl) -> str:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "e2e.demo"], cwd=REPO, capture_output=True, text=True, timeout=900, check=False
    )
    print(f"    demo: {time.monotonic() - started:.0f} s", flush=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answer(output: str, label: str) -> str:
    found = re.search(rf"^  {label} +(.*)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def test_the_demo_ends_with_an_answer_that_the_base_model_does_not_have(kubectl: Kubectl) -> None:
    output = run_demo(kubectl)
    assert "amber" in answer(output, "after the tune").lower()
    assert "amber" not in answer(output, "base model").lower()
    digest = kubectl.get("finetune", "support-bot", "-n", "demo")["status"]["adapter"]["digest"]
    assert answer(output, "answered by") == f"support-bot@{digest[7:19]}"
    assert re.search(r"support-bot +Succeeded", output)
    assert re.search(r"support-bot +Ready +Mount", output)

    jobs = sorted(job["metadata"]["uid"] for job in kubectl.items("jobs", "-n", "demo"))
    again = run_demo(kubectl)
    assert answer(again, "answered by") == answer(output, "answered by")
    assert sorted(job["metadata"]["uid"] for job in kubectl.items("jobs", "-n", "demo")) == jobs
