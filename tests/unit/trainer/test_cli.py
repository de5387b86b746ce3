"""The `finetune` command without a cluster: check-data and estimate, and a --help that imports nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.command.cli import main

from .tiny import make_tokenizer

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip


def write_finetune(path: Path, **spec: Any) -> str:
    parts = {"baseModel": {"s3": {"uri": "s3://models/llama"}}, "dataset": {"train": {"s3": {"uri": "s3://data/x"}}}}
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTune", "metadata": {"name": "a"}, "spec": parts | spec}
    path.write_text("---\nkind: ConfigMap\n---\n" + json.dumps(body))  # JSON is YAML
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    make_tokenizer(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path / "model")


def test_help_is_instant_because_nothing_is_imported() -> None:
    code = (
        "import sys\nfrom finetune_trainer.command.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'pydantic', 'numpy', 'minio', 'yaml'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("prepare", "train", "export", "merge", "check-data", "estimate"):
        assert command in done.stdout


@pytest.mark.parametrize("command", [["check-data", "rows.jsonl"], ["estimate", "a.yaml", "--model", "model"]])
def test_it_runs_with_the_base_dependencies(tmp_path: Path, model: str, command: list[str]) -> None:
    write_finetune(tmp_path / "a.yaml", resources={"gpuMemory": "24Gi"})
    (tmp_path / "rows.jsonl").write_text('{"text": "alpha"}\n')
    extras = ("certifi", "urllib3", "minio", "huggingface_hub", "numpy", "pyarrow", "tokenizers", "jinja2", "torch",
              "transformers", "datasets", "tqdm", "cel_expr_python")  # fmt: skip
    code = f"import sys\nsys.modules.update(dict.fromkeys({extras!r}))\nfrom finetune_trainer.command.cli import main\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main({command!r}))"], cwd=tmp_path, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_a_library_that_is_not_installed_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    assert main(["check-data", str(tmp_path / "rows.parquet")]) == 1
    assert "check-data needs pyarrow here: pip install 'finetune-operator[cli,trainer]'" in capsys.readouterr().err


def test_estimate_prints_every_part_and_the_verdict(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {"type": "QLoRA", "lora": {"targetModules": ["q_proj", "k_proj", "v_proj", "o_proj"]}}
    file = write_finetune(tmp_path / "a.yaml", method=lora, resources={"gpuMemory": "24Gi"})
    assert main(["estimate", file, "--model", model]) == 0
    printed = capsys.readouterr().out
    assert "trained                  13,631,488  (0.17 %)" in printed
    assert "weights                    5.3Gi     5.3Gi   5.3Gi  NF4" in printed
    assert "\nfits with micro batch 16 and gradient checkpointing: about 15.3Gi, at most 19.1Gi, of 24.0Gi\n" in printed


def test_estimate_fails_when_it_does_not_fit(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_finetune(tmp_path / "a.yaml", resources={"gpuMemory": "4Gi"})
    assert main(["estimate", file, "--model", model]) == 1
    assert "does not fit: needs about" in capsys.readouterr().out


def test_a_file_with_a_wrong_field_is_refused_by_name(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_finetune(tmp_path / "a.yaml", training={"learningrate": 1})
    assert main(["estimate", file, "--model", model]) == 1
    wrong = "spec.training.learningrate: there is no such field; did you mean learningRate?"
    assert wrong in capsys.readouterr().err


def test_a_config_that_is_no_json_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert main(["estimate", write_finetune(tmp_path / "a.yaml"), "--model", str(tmp_path)]) == 1
    assert "the base model's config.json is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "rwkv99"}, "model_type 'rwkv99' of "),
        ({}, "model/config.json names no model_type: it is not a model's config.json"),
        (None, "model: there is no config.json in it; name a model's folder"),
    ],
)
def test_a_model_that_the_estimate_does_not_know_is_named(
    tmp_path: Path, config: dict[str, Any] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is not None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert main(["estimate", write_finetune(tmp_path / "a.yaml"), "--model", str(tmp_path / "model")]) == 1
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_a_command_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune_trainer.command.check_data._files", interrupted)
    assert main(["check-data", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("option", ["--format", "--objective"])
def test_check_data_names_what_an_option_may_be(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-data", str(tmp_path), option, "Alpacca"]) == 1
    assert capsys.readouterr().err.startswith(f"{option}: Input should be '")


def test_check_data_counts_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows").write_text('{"text": "alpha"}\n{"text": "beta"}\n')
    assert main(["check-data", str(tmp_path / "rows")]) == 0
    assert "format   Text\nsamples  2\ninvalid  0\n" in capsys.readouterr().out


def test_check_data_fails_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows").write_text('{"text": "alpha"}\n{"text": ""}\n')
    assert main(["check-data", str(tmp_path / "rows")]) == 1
    assert "rows:2: text is empty" in capsys.readouterr().err


def test_check_data_reads_as_many_rows_as_prepare_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows").write_text('{"text": "alpha"}\n{"text": ""}\n')
    dataset = {"train": {"s3": {"uri": "s3://data/x"}}, "maxSamples": 1}
    file = write_finetune(tmp_path / "a.yaml", dataset=dataset)
    assert main(["check-data", str(tmp_path / "rows"), "--finetune", file]) == 0
    assert "samples  1\ninvalid  0\n" in capsys.readouterr().out


def test_check_data_shows_what_is_learned(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "alpha beta", "completion": " gamma"}
    (tmp_path / "rows").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert main(["check-data", str(tmp_path / "rows"), "--model", model]) == 0
    printed = capsys.readouterr().out
    assert "duplicates  1\n" in printed
    assert printed.endswith("   alpha beta\n>>  gamma</s>\n")
