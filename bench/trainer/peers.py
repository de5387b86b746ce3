"""LLaMA-Factory and Axolotl, installed into throwaway environments; where one does not install, it is said and not counted.

torch is held at our version: the same kernels for all, and uv links files that it has already instead of copying them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from bench.trainer.contestants import TRAINER_STEPS, Contestant, contestant
from bench.trainer.workload import MAX_LENGTH, Recipe

INSTALL_SECONDS = 600.0


def installed(work: Path, model: Path, data: Path, recipe: Recipe) -> list[Contestant]:
    """Those that install within INSTALL_SECONDS each."""
    found = []
    for package, build in {"llamafactory": llama_factory, "axolotl": axolotl}.items():
        try:
            environment = _install(package, work)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or error
            print(f"  {package}: does not install here, not counted. {said}", flush=True)
            continue
        print(f"  {package} {_version(environment, package)} installed", flush=True)
        found.append(build(environment / "bin", model, data, work, recipe))
    return found


def _install(package: str, work: Path) -> Path:
    uv = shutil.which("uv")
    if uv is None:
        raise FileNotFoundError("there is no uv on the PATH")
    environment, constraint = work / package, work / "constraint.txt"
    constraint.write_text(f"torch=={version('torch').partition('+')[0]}\n")
    commands = (
        [uv, "venv", "--quiet", "--python", sys.executable, str(environment)],
        [uv, "pip", "install", "--quiet", "--python", str(environment / "bin/python"), "-c", str(constraint), package],
    )
    for command in commands:
        subprocess.run(command, check=True, timeout=INSTALL_SECONDS, capture_output=True, text=True)
    return environment


def _version(environment: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([environment / "bin/python", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def llama_factory(programs: Path, model: Path, data: Path, work: Path, recipe: Recipe) -> Contestant:
    """`llamafactory-cli train` with its defaults for precision, padding and checkpointing."""
    columns = {"prompt": "prompt", "response": "completion"}
    (data / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": "train.jsonl", "columns": columns}}))
    settings = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "dataset": "bench",
        "dataset_dir": str(data),
        "template": "empty",
        "cutoff_len": MAX_LENGTH,
        "disable_shuffling": True,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": recipe.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(work / "output-llamafactory"),
    }
    command = [str(programs / "llamafactory-cli"), "train", _written(work / "llamafactory.yaml", settings)]
    return contestant("LLaMA-Factory", command, TRAINER_STEPS, work)


def axolotl(programs: Path, model: Path, data: Path, work: Path, recipe: Recipe) -> Contestant:
    """`axolotl train` with its defaults, but for its Triton kernels, which it chooses by itself and which need a GPU."""
    settings = {
        "base_model": str(model),
        "datasets": [
            {
                "path": str(data / "train.jsonl"),
                "ds_type": "json",
                "type": {
                    "field_instruction": "prompt",
                    "field_output": "completion",
                    "format": "{instruction}",
                    "no_input_format": "{instruction}",
                },
            }
        ],
        "adapter": "lora",
        "lora_r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "sequence_len": MAX_LENGTH,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # the rows in their order
        "val_set_size": 0,
        "micro_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "bf16": "auto",
        "logging_steps": 1,
        "dataset_prepared_path": str(work / "prepared-axolotl"),
        "output_dir": str(work / "output-axolotl"),
    }
    command = [str(programs / "axolotl"), "train", _written(work / "axolotl.yaml", settings), "--launcher", "python"]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return contestant("Axolotl", command, TRAINER_STEPS, work, AXOLOTL_DO_NOT_TRACK="1", PATH=path)


def _written(path: Path, settings: dict[str, object]) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)
