"""`finetune run`: the Jobs' code on one machine, with a folder in the bucket's place."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.command import cli, terminal
from finetune_trainer.digest import hash_tree, tree_digest

ROWS = [{"prompt": f"alpha {number}", "completion": f"beta {number}"} for number in range(16)]


def write(folder: Path, **spec: Any) -> str:
    """A FineTune file with its rows in a ConfigMap beside it; parts replace those of the spec."""
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    parts: dict[str, Any] = {
        "baseModel": {"huggingFace": {"repo": "acme/tiny"}},
        "dataset": {
            "train": {"configMap": {"name": "rows", "key": "train.jsonl"}},
            "evaluation": {"fraction": 0.25},
        },
        "method": {"type": "LoRA", "lora": {"rank": 4, "alpha": 8}},
        "training": {"maxSteps": 4, "batchSize": 2, "maxLength": 32, "precision": "FP32"},
        "evaluation": {"gates": [{"metric": "loss", "betterThanBase": True}]},
        "resources": {"gpus": 0},
    }
    tune = {"kind": "FineTune", "metadata": {"name": "bot"}, "spec": parts | spec}
    config_map = {"kind": "ConfigMap", "metadata": {"name": "rows"}, "data": {"train.jsonl": rows}}
    path = folder / "finetune.yaml"
    path.write_text(f"{json.dumps(config_map)}\n---\n{json.dumps(tune)}\n")
    return str(path)


def test_a_file_is_trained_evaluated_and_left_as_in_a_bucket_and_found_again(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, output={"exports": ["Merged", "GGUF"]})
    command = ["run", file, "--output", str(tmp_path / "out"), "--base-model", str(tiny_llama)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    [adapter] = (tmp_path / "out/adapters").iterdir()
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert manifest["digest"] == tree_digest(hash_tree(adapter)) == f"sha256:{adapter.name}"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"
    [run] = (tmp_path / "out/runs").iterdir()
    assert {"run.json", "result.json", "metrics.jsonl", "report.html", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    assert f"digest   {manifest['digest']}\nfolder   {adapter}\n" in shown
    assert f"report   {run}/report.html" in shown
    [merged] = [path for path in (tmp_path / "out/merged").iterdir() if path.name != "known"]
    assert f"merged   {merged}" in shown
    assert json.loads((merged / "manifest.json").read_text())["digest"] == f"sha256:{merged.name}"
    [gguf] = (tmp_path / "out/gguf").glob("*/bot-F32.gguf")
    assert f"gguf     {gguf.parent}" in shown
    assert "gate     loss: passed" in shown
    assert "perplexity" in shown
    assert not (tmp_path / "out/.work").exists()

    assert cli.main(command) == 0
    assert "trained before" in capsys.readouterr().out
    assert list((tmp_path / "out/runs").iterdir()) == [run]


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", write(tmp_path), "--output", str(tmp_path / "out"), "--base-model", str(tiny_llama)]
    monkeypatch.setattr(terminal.Bar, "due", lambda self: bool(signal.raise_signal(signal.SIGINT)))
    assert cli.main(command) == 143
    assert "after step 1/4; its checkpoint is saved: the same command goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(command) == 0
    [result] = (tmp_path / "out/runs").glob("*/result.json")
    assert json.loads(result.read_text())["resumedFromStep"] == 1


def test_the_bar_shows_step_and_loss() -> None:
    from io import StringIO

    from finetune_operator.api.finetunestatus import ProgressStatus

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with terminal.Bar(stream) as bar:
        assert bar.due()
        bar.progress(ProgressStatus(step=3, total_steps=10, loss=1.25, tokens_per_second=80.0))
        assert not bar.due()
    assert "3/10" in stream.getvalue()
    assert "loss 1.2500, 80 tokens/s" in stream.getvalue()


HELD_OUT = {"evaluation": {"fraction": 0.1}}
DATASET = {"train": {"configMap": {"name": "elsewhere", "key": "train.jsonl"}}, **HELD_OUT}


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            {"dataset": DATASET},
            [],
            "dataset.train: ConfigMap elsewhere is in a cluster, not here: name the rows with --data train=FILE",
        ),
        (
            {"dataset": {"train": {"persistentVolumeClaim": {"claimName": "rows"}}, **HELD_OUT}},
            [],
            "dataset.train: volume rows is in a cluster, not here: name the rows with --data train=FILE",
        ),
        (
            {"baseModel": {"persistentVolumeClaim": {"claimName": "models"}}},
            [],
            "baseModel: volume models is in a cluster, not here: name the model's folder with --base-model DIR",
        ),
        (
            {"baseModel": {"s3": {"uri": "s3://models/tiny"}}},
            [],
            "baseModel: s3://models/tiny cannot be reached: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        (
            {"dataset": {"train": {"s3": {"uri": "s3://data/rows.jsonl"}}, **HELD_OUT}},
            [],
            "when it is not at AWS; or name what is here with --data train=FILE",
        ),
        ({}, ["--output", "/dev/null"], "--output /dev/null: File exists; name a folder that can be written to"),
        (
            {},
            ["--data", "test=rows.jsonl"],
            "--data test=rows.jsonl: write --data train=FILE or --data evaluation=FILE",
        ),
        ({}, ["--data", "nowhere.jsonl"], "--data train=nowhere.jsonl: there is no such file or folder"),
        ({}, ["--base-model", "nowhere"], "--base-model nowhere: there is no config.json in it"),
        ({"resources": {"gpus": 2}}, [], "set resources.nodes: 1 and resources.gpus: 1"),
        ({"resources": {"gpus": 1}}, [], "set resources.gpus: 0, or add --cpu, to train on the CPU"),
    ],
)
def test_what_cannot_be_done_here_is_one_line_that_says_what_to_do(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spec: dict[str, Any],
    options: list[str],
    message: str,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["run", write(tmp_path, **spec), "--output", str(tmp_path / "out"), *options]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_bad_rows_are_told_with_file_and_line(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "alpha", "completion": "beta"}\n{"prompt": "alpha"}\n')
    command = ["run", write(tmp_path), "--output", str(tmp_path / "out"), "--base-model", str(tiny_llama)]
    assert cli.main([*command, "--data", str(tmp_path / "rows.jsonl")]) == 1
    assert "InvalidDataset: " in (told := capsys.readouterr().err)
    assert "rows.jsonl:2: " in told


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune_trainer.command.local import alone_in

    with alone_in(tmp_path / "out"):
        assert cli.main(["run", write(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "is used by another finetune run" in capsys.readouterr().err
