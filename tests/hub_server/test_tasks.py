"""lm-eval's tasks with their data from a hub, through the real client libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server.server import HubServer

CARD = """---
configs:
- config_name: {name}
  data_files:
{splits}---
"""
# Asks for each of the tasks by itself and prints what became of it.
SCRIPT = """
import json, sys
from pathlib import Path
from finetune_operator.api.evaluation import Evaluation
from finetune_trainer.failures import RunFailure
from finetune_trainer.runspec import Storage
from finetune_trainer.storage.store import Store
from finetune_trainer.evaluation.tasks import catalogue
from finetune_trainer.evaluation.tasks.fetch import from_hub, leave_tasks

work, names = Path(sys.argv[1]), sys.argv[2:]
manager = catalogue.tasks_in(["arc", "gsm8k", "hellaswag", "piqa", "winogrande"])
bucket = Store(Storage(uri=f"file://{work}/bucket"))
for name in names:
    asked = Evaluation.model_validate({"tasks": [{"name": name, "fewShot": 1}]})
    try:
        told = leave_tasks(asked, manager, from_hub, bucket, work / name).model_dump(mode="json")
    except RunFailure as failure:
        told = {"reason": failure.reason, "message": failure.message}
    print("TOLD", json.dumps(told))
"""


def put(root: Path, repo: str, name: str, splits: dict[str, list[dict[str, object]]]) -> None:
    folder = root / "datasets" / repo
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
    (folder / "README.md").write_text(CARD.format(name=name, splits=listed))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "hub"
    arc = [
        {
            "id": "1",
            "question": "What is it?",
            "choices": {"text": list("wxyz"), "label": list("ABCD")},
            "answerKey": "B",
        }
    ]
    put(root, "allenai/ai2_arc", "ARC-Easy", {"train": arc * 3, "validation": arc, "test": arc * 2})
    put(
        root,
        "openai/gsm8k",
        "main",
        {split: [{"question": "1+1?", "answer": "#### 2"}] * 2 for split in ("train", "test")},
    )
    put(root, "allenai/winogrande", "winogrande_xl", {"train": [{"sentence": "_"}]})
    (root / "datasets/Rowan/hellaswag").mkdir(parents=True)
    (root / "datasets/Rowan/hellaswag/hellaswag.py").write_text("raise SystemExit('code from a hub was run')\n")
    (root / "hub.json").write_text(json.dumps({"gated": ["allenai/winogrande"], "tokens": {}}))
    return root


def test_data_comes_from_the_hub_and_what_cannot_be_had_is_refused(root: Path, tmp_path: Path) -> None:
    with HubServer(root) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        names = ["arc_easy", "gsm8k", "piqa", "winogrande", "hellaswag"]
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "work"), *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert len(lines) == len(names), done.stdout + done.stderr
    easy, sums, missing, gated, program = map(json.loads, lines)
    assert (easy["questions"], sums["questions"]) == (2, 2)
    assert easy["uri"].endswith(easy["digest"].removeprefix("sha256:"))
    assert missing == {
        "reason": "InvalidTask",
        "message": f"evaluation.tasks: piqa: its data baber/piqa is not on {hub.url}, or may not be seen; put a copy there",
    }
    assert gated["reason"] == program["reason"] == "InvalidTask"
    assert "does not let everybody read its data allenai/winogrande, and tasks have no token" in gated["message"]
    assert (
        "hellaswag reads Rowan/hellaswag with a program of that repository, and code from there is never run"
        in (program["message"])
    )
