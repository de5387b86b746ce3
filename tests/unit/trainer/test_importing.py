"""axolotl's and LLaMA-Factory's own examples as FineTunes: what is carried over, what is said, what is refused."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finetune_operator.api.finetune import FineTune, FineTuneSpec
from finetune_trainer.command.cli import main
from finetune_trainer.command.importing import axolotl, llamafactory
from finetune_trainer.command.importing.command import detect, imported
from finetune_trainer.command.importing.settings import CannotImport, Settings, without_nothing
from finetune_trainer.data.check import Problems, read_samples
from finetune_trainer.data.formats import Judged
from finetune_trainer.data.rows import DataFile

# examples/code-llama/7b/qlora.yml of axolotl-ai-cloud/axolotl
AXOLOTL_QLORA: dict[str, Any] = {
    "base_model": "codellama/CodeLlama-7b-hf", "model_type": "LlamaForCausalLM",
    "load_in_8bit": False, "load_in_4bit": True, "strict": False,
    "datasets": [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}], "dataset_prepared_path": None,
    "val_set_size": 0.05, "output_dir": "./qlora-out", "adapter": "qlora", "lora_model_dir": None,
    "sequence_len": 4096, "sample_packing": True, "pad_to_sequence_len": True,
    "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_modules": None, "lora_target_linear": True,
    "wandb_project": None, "gradient_accumulation_steps": 4, "micro_batch_size": 2, "num_epochs": 4,
    "optimizer": "paged_adamw_32bit", "lr_scheduler": "cosine", "learning_rate": 0.0002, "train_on_inputs": False,
    "bf16": "auto", "fp16": False, "tf32": False, "gradient_checkpointing": True, "flash_attention": True,
    "warmup_steps": 10, "evals_per_epoch": 4, "saves_per_epoch": 1, "weight_decay": 0.0,
    "special_tokens": {"bos_token": "<s>"},
}  # fmt: skip
# examples/llama-3/lora-8b.yml of the same
AXOLOTL_LORA: dict[str, Any] = {
    "base_model": "NousResearch/Meta-Llama-3-8B", "load_in_8bit": True, "load_in_4bit": False,
    "datasets": [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}], "val_set_size": 0.05,
    "sequence_len": 4096, "sample_packing": True, "eval_sample_packing": False, "adapter": "lora",
    "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True,
    "lora_modules_to_save": ["embed_tokens", "lm_head"], "gradient_accumulation_steps": 4, "micro_batch_size": 2,
    "num_epochs": 4, "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine", "learning_rate": 0.0002,
    "bf16": "auto", "gradient_checkpointing": True, "warmup_ratio": 0.1, "saves_per_epoch": 1,
}  # fmt: skip
# examples/train_lora/llama3_lora_sft.yaml of hiyouga/LLaMA-Factory
LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "trust_remote_code": True, "stage": "sft",
    "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all",
    "dataset": "identity,alpaca_en_demo", "template": "llama3", "cutoff_len": 2048, "max_samples": 1000,
    "overwrite_cache": True, "preprocessing_num_workers": 16, "output_dir": "saves/llama3-8b/lora/sft",
    "logging_steps": 10, "save_steps": 500, "plot_loss": True, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8, "learning_rate": 1.0e-4, "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000,
}  # fmt: skip
# examples/train_lora/llama3_lora_dpo.yaml of the same, where it differs
LLAMA_FACTORY_DPO = {
    **LLAMA_FACTORY,
    "stage": "dpo",
    "pref_beta": 0.2,
    "pref_loss": "sigmoid",
    "dataset": "dpo_en_demo",
}


def spec_of(values: dict[str, Any], folder: Path = Path("nowhere")) -> FineTuneSpec:
    settings = Settings(values)
    convert = axolotl.convert if detect(values) == "axolotl" else lambda s: llamafactory.convert(s, folder)
    return FineTuneSpec.model_validate(without_nothing(convert(settings)))


def warnings_of(values: dict[str, Any], folder: Path) -> list[str]:
    (folder / "a.yaml").write_text(yaml.safe_dump(values))
    return imported(folder / "a.yaml")[1]


@pytest.mark.parametrize("values", [AXOLOTL_QLORA, LLAMA_FACTORY], ids=["axolotl", "llama-factory"])
def test_what_is_written_can_be_applied_and_names_its_origin(
    tmp_path: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "My config_1.yml").write_text(yaml.safe_dump(values))
    assert main(["import", str(tmp_path / "My config_1.yml"), "--to", str(tmp_path / "out.yaml")]) == 0
    written = (tmp_path / "out.yaml").read_text()
    assert written.startswith("# Imported from My config_1.yml (")
    tune = FineTune.model_validate(yaml.safe_load(written))
    assert tune.metadata.name == "my-config-1"
    assert tune.spec == spec_of(values)
    assert main(["import", str(tmp_path / "My config_1.yml")]) == 0
    assert capsys.readouterr().out == written


def test_axolotls_qlora_is_carried_over() -> None:
    spec = spec_of(AXOLOTL_QLORA)
    assert spec.base_model.hugging_face
    assert spec.base_model.hugging_face.repo == "codellama/CodeLlama-7b-hf"
    assert (spec.method.type, spec.method.quantization.type, spec.method.quantization.double_quant) == (
        "QLoRA", "NF4", True
    )  # fmt: skip
    lora, training = spec.method.lora, spec.training
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (32, 16, 0.05, ["all-linear"])
    assert (training.batch_size, training.micro_batch_size, training.epochs) == (8, 2, 4.0)
    assert (training.max_length, training.packing, training.optimizer) == (4096, "Enabled", "paged_adamw_32bit")
    assert (training.gradient_checkpointing, training.precision, training.loss_on) == ("Enabled", "Auto", "Completion")
    assert (spec.dataset.format, spec.dataset.on_too_long) == ("Alpaca", "Drop")
    assert spec.dataset.evaluation
    assert spec.dataset.evaluation.fraction == 0.05
    assert spec.checkpoint.every == "epoch"


def test_what_has_no_equivalent_is_said_with_value_and_reason(tmp_path: Path) -> None:
    told = warnings_of({**AXOLOTL_QLORA, "brand_new_setting": 7}, tmp_path)
    assert "warmup_steps: 10: a FineTune has a share of the steps: training.warmupRatio: 0.03 is taken" in told
    assert "flash_attention: True: the trainer chooses its attention; the result is the same" in told
    assert "brand_new_setting: 7: unknown to finetune import; check whether it matters" in told
    named = {warning.partition(":")[0] for warning in told}
    silent = {"load_in_8bit", "strict", "dataset_prepared_path", "lora_model_dir", "wandb_project", "tf32", "fp16"}
    assert not named & silent  # nothing was asked for there


def test_trackers_are_carried_over_and_their_keys_said(tmp_path: Path) -> None:
    asked = {
        "wandb_project": "bots", "wandb_entity": "acme", "wandb_name": "first",
        "mlflow_tracking_uri": "http://mlflow:5000", "mlflow_experiment_name": "bots",
    }  # fmt: skip
    tracking = spec_of({**AXOLOTL_QLORA, **asked}).tracking
    assert tracking and tracking.wandb and tracking.mlflow
    assert (tracking.wandb.project, tracking.wandb.entity) == ("bots", "acme")
    assert (tracking.mlflow.uri, tracking.mlflow.experiment) == ("http://mlflow:5000", "bots")
    told = warnings_of({**AXOLOTL_QLORA, **asked}, tmp_path)
    assert "wandb_project: 'bots': the API key is read from the key token of Secret wandb; here: WANDB_API_KEY" in told
    assert "wandb_name: 'first': a run is named as its FineTune, and found by its inputs" in told
    assert spec_of({**AXOLOTL_QLORA, **asked, "mlflow_tracking_uri": None, "use_wandb": False}).tracking is None
    assert spec_of({**AXOLOTL_QLORA, "mlflow_tracking_uri": "file:./mlruns"}).tracking is None


@pytest.mark.parametrize(
    ("report_to", "said"),
    [
        ("wandb", "the API key is read from the key token of Secret wandb; here: WANDB_API_KEY"),
        ("mlflow", "name the server in tracking.mlflow.uri"),
        (["tensorboard"], "metrics.jsonl, TensorBoard files and report.html are in the bucket"),
    ],
)
def test_what_llama_factory_reports_to_is_carried_over_or_said(tmp_path: Path, report_to: Any, said: str) -> None:
    tracking = spec_of({**LLAMA_FACTORY, "report_to": report_to}).tracking
    assert (tracking is not None) == (report_to == "wandb")
    assert f"report_to: {report_to!r}: {said}" in warnings_of({**LLAMA_FACTORY, "report_to": report_to}, tmp_path)


def test_axolotls_8_bit_lora_and_whole_modules_are_carried_over() -> None:
    spec = spec_of(AXOLOTL_LORA)
    assert (spec.method.type, spec.method.quantization.type) == ("LoRA", "INT8")
    assert spec.method.lora.modules_to_save == ["embed_tokens", "lm_head"]
    assert (spec.training.optimizer, spec.training.warmup_ratio) == ("adamw_8bit", 0.1)


def test_llama_factorys_defaults_are_written_out() -> None:
    spec = spec_of(LLAMA_FACTORY)
    assert (spec.method.type, spec.method.lora.alpha, spec.method.lora.dropout) == ("LoRA", 16, 0.0)
    assert (spec.training.batch_size, spec.training.packing, spec.training.precision) == (8, "Disabled", "BF16")
    assert (spec.dataset.max_samples, spec.checkpoint.every, spec.base_model.trust_remote_code) == (1000, 500, True)
    plain = spec_of({name: LLAMA_FACTORY[name] for name in ("model_name_or_path", "dataset", "finetuning_type")})
    assert (plain.training.learning_rate, plain.training.scheduler, plain.training.warmup_ratio) == (5e-5, "Linear", 0)
    four = spec_of({**LLAMA_FACTORY, "quantization_bit": 4})
    assert (four.method.type, four.method.quantization.type) == ("QLoRA", "NF4")


def test_datasets_that_dataset_info_knows_are_found(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    known = {
        "orca": {"hf_hub_url": "Open-Orca/OpenOrca", "columns": {"prompt": "question", "system": "system_prompt"}},
        "chat": {"hf_hub_url": "a/chat", "subset": "en", "formatting": "sharegpt", "tags": {"role_tag": "role"}},
    }
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(known))
    orca = spec_of({**LLAMA_FACTORY, "dataset": "orca"}, tmp_path / "examples").dataset
    assert orca.train.hugging_face
    assert orca.train.hugging_face.repo == "Open-Orca/OpenOrca"
    assert (orca.format, orca.columns.instruction, orca.columns.system) == ("Alpaca", "question", "system_prompt")
    chat = spec_of({**LLAMA_FACTORY, "dataset": "chat"}, tmp_path / "examples").dataset
    assert (chat.format, chat.train.hugging_face and chat.train.hugging_face.subset) == ("Messages", "en")
    with pytest.raises(CannotImport, match="they have different formats"):
        spec_of({**LLAMA_FACTORY, "dataset": "orca,chat"}, tmp_path / "examples")


def test_preferences_become_their_objective() -> None:
    spec = spec_of(LLAMA_FACTORY_DPO)
    assert (spec.objective.type, spec.objective.beta) == ("DPO", 0.2)
    assert spec_of({**LLAMA_FACTORY_DPO, "pref_loss": "orpo"}).objective.type == "ORPO"
    ours = {"path": "argilla/x", "type": "chatml.argilla"}
    spec = spec_of({**AXOLOTL_QLORA, "rl": "dpo", "datasets": [ours], "sample_packing": False})
    assert (spec.objective.type, spec.dataset.format) == ("DPO", "Preference")
    assert spec.dataset.columns.chosen == "chosen_response"


def test_the_weights_of_good_and_bad_answers_are_taken_over() -> None:
    judged = {"path": "a/b", "type": "llama3.ultra"}
    weights = {"kto_desirable_weight": 0.2, "kto_undesirable_weight": 1.0}
    ours = spec_of({**AXOLOTL_QLORA, "rl": "kto", "datasets": [judged], "sample_packing": False, **weights}).objective
    weights = {"kto_chosen_weight": 0.2, "kto_rejected_weight": 1.0}
    theirs = spec_of({**LLAMA_FACTORY, "stage": "kto", **weights}).objective
    for objective in (ours, theirs):
        assert (objective.type, objective.desirable_weight, objective.undesirable_weight) == ("KTO", 0.2, 1.0)


@pytest.mark.parametrize(
    ("dataset", "form", "columns"),
    [
        ({"type": "completion", "field": "body"}, "Text", {"text": "body"}),
        ({"type": "sharegpt"}, "ShareGPT", {}),
        ({"type": "chat_template", "field_messages": "chat"}, "Messages", {"messages": "chat"}),
        (
            {
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
            },
            "ShareGPT",
            {},
        ),
        (
            {"type": {"field_instruction": "question", "field_output": "answer"}},
            "Alpaca",
            {"instruction": "question", "output": "answer"},
        ),
    ],
)
def test_axolotls_dataset_types_are_formats(dataset: dict[str, Any], form: str, columns: dict[str, str]) -> None:
    found = spec_of({**AXOLOTL_QLORA, "datasets": [{"path": "a/b", **dataset}]}).dataset
    assert found.format == form
    assert found.columns.model_dump(exclude_none=True) == columns


def test_llama_factorys_own_preference_examples_are_rows_that_can_be_read(tmp_path: Path) -> None:
    """examples/train_lora/*_dpo.yaml and *_kto.yaml with the entries of data/dataset_info.json and rows like theirs."""
    (tmp_path / "data").mkdir()
    openai = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    known: dict[str, Any] = {
        "dpo_en_demo": {
            "file_name": "dpo_en_demo.json", "ranking": True, "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        "kto_en_demo": {
            "file_name": "kto_en_demo.json", "formatting": "sharegpt", "tags": openai,
            "columns": {"messages": "messages", "kto_tag": "label"},
        },
    }  # fmt: skip
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(known))
    asked, answer = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
    pair = {"conversations": [asked], "chosen": answer, "rejected": {"from": "gpt", "value": "c"}}
    judged = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": True}
    for stage, name, row in (("dpo", "dpo_en_demo", pair), ("rm", "dpo_en_demo", pair), ("kto", "kto_en_demo", judged)):
        spec = spec_of({**LLAMA_FACTORY, "stage": stage, "dataset": name}, tmp_path)
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        problems = Problems()
        files = [DataFile(tmp_path / "rows.json", "rows.json")]
        (found,) = read_samples(files, spec.dataset, spec.objective.type, problems).samples
        assert not problems.count, problems.first
        answers = [found.sample.answer] if isinstance(found.sample, Judged) else [found.sample.chosen]
        assert [[message["content"] for message in one.messages] for one in answers] == [["a", "b"]]


def test_datasets_with_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    entry = {"file_name": "mllm_demo.json", "formatting": "sharegpt", "columns": {"images": "images"}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"mllm_demo": entry}))
    with pytest.raises(CannotImport, match="images: 'images': a FineTune learns from text alone"):
        spec_of({**LLAMA_FACTORY, "dataset": "mllm_demo"}, tmp_path)


@pytest.mark.parametrize(
    ("values", "batch"),
    [
        ({"gradient_accumulation_steps": None, "batch_size": 16}, 16),
        ({"gradient_accumulation_steps": None}, 2),
        ({"gradient_accumulation_steps": 4, "batch_size": None}, 8),
    ],
)
def test_axolotls_batch_size_is_the_effective_one(values: dict[str, Any], batch: int) -> None:
    assert spec_of({**AXOLOTL_QLORA, **values}).training.batch_size == batch


def test_no_warm_up_stays_none() -> None:
    for values in (AXOLOTL_QLORA, LLAMA_FACTORY):
        assert spec_of({**values, "warmup_steps": 0, "warmup_ratio": None}).training.warmup_ratio == 0.0


def test_a_slice_of_a_split_is_carried_over() -> None:
    sliced = {"path": "a/b", "type": "alpaca", "split": "train[:10%]"}
    source = spec_of({**AXOLOTL_QLORA, "datasets": [sliced]}).dataset.train.hugging_face
    assert source and source.split == "train[:10%]"
    with pytest.raises(CannotImport, match="split: 'train.test': a FineTune reads one split or a slice of it"):
        spec_of({**AXOLOTL_QLORA, "datasets": [{**sliced, "split": "train+test"}]})


def test_axolotls_reward_model_example_is_carried_over() -> None:
    """examples/gemma2/reward-model.yaml"""
    pairs = {"path": "argilla/distilabel-intel-orca-dpo-pairs", "type": "bradley_terry.chat_template"}
    values = {**AXOLOTL_QLORA, "reward_model": True, "datasets": [pairs], "sample_packing": False}
    spec = spec_of(values)
    assert (spec.objective.type, spec.dataset.format, spec.dataset.columns.prompt) == ("Reward", "Preference", "input")


def test_prompts_that_lose_their_template_are_said(tmp_path: Path) -> None:
    """chatml.intel and its like put a prompt of text into ChatML; a FineTune does so where rows have a system column."""
    for kind, said in (("chatml.prompt_pairs", True), ("chatml.ultra", False), ("chatml.argilla_chat", False)):
        told = warnings_of({**AXOLOTL_QLORA, "rl": "dpo", "datasets": [{"path": "a/b", "type": kind}]}, tmp_path)
        assert any("is learned as it is, without the chat template" in one for one in told) == said


def test_files_that_are_not_in_the_cluster_are_asked_for(tmp_path: Path) -> None:
    local = {"path": "./rows.jsonl", "type": "completion", "ds_type": "json"}
    assert (
        "datasets[0].path: './rows.jsonl': upload it to s3://datasets/rows.jsonl or change dataset.train; "
        "here: finetune run --data ./rows.jsonl"
    ) in warnings_of({**AXOLOTL_QLORA, "datasets": [local]}, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**AXOLOTL_QLORA, "adapter": None}, "adapter: it is not set, which is full fine-tuning"),
        ({**AXOLOTL_QLORA, "relora": True}, "relora: True: ReLoRA trains other weights than LoRA"),
        ({**AXOLOTL_QLORA, "optimizer": "muon"}, "optimizer: 'muon': a FineTune has no such thing; it has adamw_torch"),
        ({**AXOLOTL_QLORA, "rl": "grpo"}, "rl: 'grpo': a FineTune has DPO, KTO and ORPO"),
        ({**AXOLOTL_QLORA, "val_set_size": 500}, "val_set_size: 500: a FineTune holds out a share"),
        ({**AXOLOTL_QLORA, "datasets": [{"path": "a/b", "type": "rp_forum"}]}, "datasets[0].type: 'rp_forum'"),
        ({**LLAMA_FACTORY, "finetuning_type": "full"}, "finetuning_type: 'full': a FineTune trains adapters"),
        ({**LLAMA_FACTORY, "stage": "ppo"}, "stage: 'ppo'"),
        ({**LLAMA_FACTORY, "quantization_bit": 3}, "quantization_bit: 3: a FineTune has 4 and 8 bit"),
        ({**LLAMA_FACTORY, "use_galore": True}, "use_galore: True: GaLore trains the whole model"),
    ],
)
def test_what_would_train_something_else_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert main(["import", str(tmp_path / "a.yaml")]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"{tmp_path / 'a.yaml'}: {message}")
    assert printed.out == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**AXOLOTL_QLORA, "micro_batch_size": "two"}, "micro_batch_size: 'two': a number is expected"),
        ({**AXOLOTL_QLORA, "lora_r": 8.5}, "lora_r: 8.5: a whole number is expected"),
        ({**AXOLOTL_QLORA, "learning_rate": True}, "learning_rate: True: a number is expected"),
        ({**AXOLOTL_QLORA, "sample_packing": "maybe"}, "sample_packing: 'maybe': true or false is expected"),
        ({**AXOLOTL_QLORA, "datasets": "tatsu-lab/alpaca"}, "datasets: 'tatsu-lab/alpaca': a list is expected, each"),
        ({**AXOLOTL_QLORA, "datasets": [{"path": ["a"], "type": "alpaca"}]}, "datasets[0].path: ['a']: text is expect"),
        ({**AXOLOTL_QLORA, "peft": "loftq"}, "peft: 'loftq': settings of its own are expected (name: value)"),
        ({**LLAMA_FACTORY, "lora_target": {"q": 1}}, "lora_target: {'q': 1}: a list of names is expected"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_expected(
    tmp_path: Path, values: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert main(["import", str(tmp_path / "a.yaml")]) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'a.yaml'}: {message}")


@pytest.mark.parametrize("values", [AXOLOTL_QLORA, AXOLOTL_LORA, LLAMA_FACTORY_DPO], ids=["qlora", "lora", "dpo"])
def test_no_value_of_any_setting_ends_in_a_traceback(values: dict[str, Any]) -> None:
    strange = ["two", "", -1, 0.5, float("nan"), float("inf"), True, False, [], ["a", [1]], [None], {}, {"a": {"b": 1}}]
    for name in values:
        for value in strange:
            with suppress(CannotImport, ValidationError):
                spec_of({**values, name: value})


def test_a_wrong_entry_of_dataset_info_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info = tmp_path / "data/dataset_info.json"
    info.write_text(json.dumps({"identity": {"columns": "all"}, "alpaca_en_demo": 3}))
    with pytest.raises(CannotImport, match=re.escape(f"{info}: identity.columns: 'all': settings of its own")):
        spec_of(LLAMA_FACTORY, tmp_path)
    info.write_text("[]")
    with pytest.raises(CannotImport, match=re.escape(f"{info} holds no datasets")):
        spec_of(LLAMA_FACTORY, tmp_path)


def test_a_file_that_is_no_yaml_is_named_with_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("base_model: a/b\nadapter: [lora\nlora_r: 8\n")
    assert main(["import", str(tmp_path / "a.yaml")]) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'a.yaml'}:3:7: no YAML: expected ',' or ']'")


def test_a_file_of_neither_is_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-4\n")
    assert main(["import", str(tmp_path / "a.yaml")]) == 1
    assert "name the tool with --from" in capsys.readouterr().err


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert spec_of({**AXOLOTL_QLORA, "learning_rate": "2e-4", "lora_dropout": "5e-2"}).method.lora.dropout == 0.05
