"""The published recipes, trained as their files are: on small models of the same architecture, with rows of the same shape."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from finetune_trainer.command import cli

from .tiny import VOCABULARY, make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
DOLLY = {"instruction": "alpha beta", "context": "gamma", "response": "delta one", "category": "open_qa"}
CHAT = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
GUANACO = {"text": "### Human: alpha beta### Assistant: gamma"}


def stand_in(folder: Path, shape: str) -> Path:
    """A model of the architecture in docs/shapes with two narrow layers, and no chat template, as base models have none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((ROOT / "docs/shapes" / shape / "config.json").read_text())
    heads = {
        "num_attention_heads": 8,
        "num_key_value_heads": 8 * config["num_key_value_heads"] // config["num_attention_heads"],
    }
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY, **heads}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | small, eos_token_id=2))
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def train(folder: Path, recipe: str, shape: str, row: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """(output folder, adapter_config.json) of `finetune run` on a recipe."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
    command = ["run", str(ROOT / f"examples/recipes/{recipe}.yaml"), "--cpu", "--output", str(folder / "out")]
    command += ["--base-model", str(stand_in(folder / "base", shape)), "--data", str(folder / "rows.jsonl")]
    assert cli.main(command) == 0
    [adapter] = (folder / "out/adapters").iterdir()
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return folder / "out", config


def learned(output: Path) -> list[tuple[str, bool]]:
    [preview] = output.glob("datasets/*/preview.json")
    return [(piece["text"], piece["learned"]) for piece in json.loads(preview.read_text())]


def lineage(output: Path) -> dict[str, Any]:
    [manifest] = output.glob("adapters/*/manifest.json")
    found: dict[str, Any] = json.loads(manifest.read_text())
    return found


def test_lora_on_dolly_saves_each_epoch(tmp_path: Path) -> None:
    output, config = train(tmp_path, "llama-3.1-8b-lora-dolly", "llama-3.1-8b", DOLLY)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert sorted(config["target_modules"]) == ATTENTION
    assert learned(output)[:2] == [
        ("<s>### User:\nalpha beta\n\ngamma\n\n### Assistant:\n", False),
        ("delta one</s>", True),
    ]
    # 20 rows, 16 to a step: epochs end within steps 2, 3 and 4
    assert sorted(path.name for path in output.glob("runs/*/checkpoints/*")) == ["step-2", "step-3", "step-4"]
    assert lineage(output)["quantization"] == "None"


def test_qlora_of_70b_on_all_seven_modules(tmp_path: Path) -> None:
    output, config = train(tmp_path, "llama-3.1-70b-qlora", "llama-3.1-70b", {"messages": CHAT})
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (64, 128, 0.1)
    assert sorted(config["target_modules"]) == sorted([*ATTENTION, "gate_proj", "up_proj", "down_proj"])
    found = lineage(output)
    assert (found["quantization"], found["doubleQuant"]) == ("NF4", True)


def test_qlora_on_guanaco_is_merged_in_fp16_with_its_tokenizer(tmp_path: Path) -> None:
    output, config = train(tmp_path, "llama-2-7b-qlora-guanaco", "llama-2-7b", GUANACO)
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (16, 32, ATTENTION)
    assert learned(output)[-1] == (GUANACO["text"][1:] + "</s>", True)
    [merged] = [path.parent for path in output.glob("merged/*/manifest.json")]
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float16"
    assert (merged / "tokenizer.json").is_file()
    with safe_open(merged / "model.safetensors", framework="pt") as tensors:
        assert {str(tensors.get_tensor(name).dtype) for name in tensors.keys()} == {"torch.float16"}  # noqa: SIM118
