"""The prepare stage against a real MinIO: what it leaves in the bucket, and how it fails."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_operator.api.finetunestatus import AdapterStatus, EvaluationStatus
from finetune_trainer import prepare
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.digest import hash_tree, tree_digest
from finetune_trainer.failures import RunFailure
from finetune_trainer.runspec import PrepareResult, RunSpec, Storage, TrainResult
from finetune_trainer.sources import basemodel
from finetune_trainer.storage.store import Store

from .tiny import finetune_spec, make_tokenizer

IGNORE = -100


@pytest.fixture
def bucket(endpoint: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The test's own folder in the bucket, with the tiny base model at base/."""
    monkeypatch.setattr(prepare, "WORK", tmp_path / "work")
    store = Store(Storage(uri=f"s3://finetune/{tmp_path.name}", endpoint=endpoint), wait_seconds=2)
    for file in tiny_llama.iterdir():
        store.put_file(f"base/{file.name}", file)
    return store


def run_prepare(bucket: Store, endpoint: str, **parts: Any) -> PrepareResult:
    parts.setdefault("baseModel", {"s3": {"uri": bucket.uri("base")}})
    spec = finetune_spec(**parts)
    run = RunSpec(
        stage="prepare",
        namespace="demo",
        name="t",
        job="t-prepare",
        spec=spec,
        storage=Storage(uri=bucket.uri(), endpoint=endpoint),
    )
    result = prepare.main(run)
    assert len(result.wire()) <= 4096
    assert result.prepared
    return result.prepared


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def chat(number: int, answer: str = "beta") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"alpha {number}"},
            {"role": "assistant", "content": f"{answer} {number}"},
        ]
    }


def put_rows(bucket: Store, rows: list[Any], name: str = "train.jsonl") -> dict[str, Any]:
    bucket.put_bytes(f"data/{name}", jsonl(rows))
    return {"train": {"s3": {"uri": bucket.uri(f"data/{name}")}}}


def download(bucket: Store, prepared: PrepareResult, directory: Path) -> list[dict[str, Any]]:
    bucket.at(prepared.dataset.uri).download_tree("", directory, prepared.dataset.digest)
    return pq.read_table(sorted(directory.glob("train-*.parquet"))).to_pylist()


def test_messages_become_packed_rows_that_learn_answers_only(bucket: Store, endpoint: str, tmp_path: Path) -> None:
    prepared = run_prepare(bucket, endpoint, dataset=put_rows(bucket, [chat(n) for n in range(40)]))
    assert prepared.dataset.format == "Messages"
    assert prepared.dataset.samples == 40
    assert prepared.dataset.duplicates == 0
    assert prepared.base_model.parameters == pq_parameters(bucket)
    rows = download(bucket, prepared, tmp_path / "dataset")
    assert sum(len(row["input_ids"]) for row in rows) == prepared.dataset.tokens
    assert sum(len(row["seq_lengths"]) for row in rows) == 40
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 64 for row in rows)

    tokenizer = load_tokenizer(basemodel.download(bucket, prepared.base_model, tmp_path / "model"))
    row = rows[0]
    length = row["seq_lengths"][0]
    ids, labels = np.array(row["input_ids"][:length]), np.array(row["labels"][:length])
    assert tokenizer.decode(ids) == "[user] alpha 0</s>[assistant] beta 0</s>"
    assert tokenizer.decode(ids[labels != IGNORE]) == " beta 0</s>"  # the blank is in the word's own token
    preview = json.loads((tmp_path / "dataset/preview.json").read_text())
    assert [(piece["text"], piece["learned"]) for piece in preview] == [
        ("[user] alpha 0</s>[assistant]", False),
        (" beta 0</s>", True),
    ]


def pq_parameters(bucket: Store) -> int:
    from safetensors import deserialize

    tensors = deserialize(bucket.get_bytes("base/model.safetensors"))
    return sum(int(np.prod(tensor["shape"])) for _, tensor in tensors)


def test_the_same_inputs_have_the_same_digest_and_run_id(bucket: Store, endpoint: str) -> None:
    dataset = put_rows(bucket, [chat(n) for n in range(10)])
    first, second = (run_prepare(bucket, endpoint, dataset=dataset) for _ in range(2))
    assert first == second
    other = run_prepare(bucket, endpoint, dataset=put_rows(bucket, [chat(n) for n in range(11)]))
    assert (other.run_id, other.dataset.digest) != (first.run_id, first.dataset.digest)
    assert other.base_model == first.base_model


def test_bad_rows_fail_with_file_and_line(bucket: Store, endpoint: str) -> None:
    rows = [
        chat(0),
        {"messages": [{"role": "user", "content": "alpha"}]},
        chat(1),
        {"messages": [{"role": "boss", "content": "alpha"}]},
    ]
    dataset = put_rows(bucket, rows)
    with pytest.raises(RunFailure) as caught:
        run_prepare(bucket, endpoint, dataset=dataset)
    assert caught.value.reason == "InvalidDataset"
    assert caught.value.message == (
        "2 of 4 rows are invalid; correct them, or set dataset.onInvalidRow: Skip\n"
        "train.jsonl:2: messages ends with a user turn: the last turn must be the assistant's, it is what is learned\n"
        'train.jsonl:4: messages[0].role is "boss": use system, user, assistant or tool'
    )
    prepared = run_prepare(bucket, endpoint, dataset={**dataset, "onInvalidRow": "Skip"})
    assert (prepared.dataset.samples, prepared.dataset.skipped) == (2, 2)


def test_a_held_out_fraction_shares_no_row_with_what_is_learned(bucket: Store, endpoint: str, tmp_path: Path) -> None:
    rows = [chat(n % 50) for n in range(100)]  # each row twice
    prepared = run_prepare(bucket, endpoint, dataset={**put_rows(bucket, rows), "evaluation": {"fraction": 0.1}})
    assert prepared.dataset.samples + prepared.dataset.evaluation_samples == 100
    assert prepared.dataset.evaluation_samples == 10
    assert prepared.dataset.duplicates == 50
    learned = download(bucket, prepared, tmp_path / "dataset")
    held = pq.read_table(tmp_path / "dataset/evaluation-00000.parquet").to_pylist()
    assert samples_of(learned).isdisjoint(samples_of(held))


def samples_of(rows: list[dict[str, Any]]) -> set[tuple[int, ...]]:
    found = set()
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            found.add(tuple(row["input_ids"][start : start + length]))
            start += length
    return found


def test_long_samples_are_cut_dropped_or_refused(bucket: Store, endpoint: str) -> None:
    rows = [
        chat(0),
        chat(1, "beta " * 200),
        {"messages": [{"role": "user", "content": "alpha " * 200}, {"role": "assistant", "content": "beta"}]},
    ]
    dataset = put_rows(bucket, rows)
    cut = run_prepare(bucket, endpoint, dataset=dataset).dataset
    assert (cut.samples, cut.truncated, cut.dropped) == (
        2,
        1,
        1,
    )  # the third is cut before its answer: nothing to learn
    dropped = run_prepare(bucket, endpoint, dataset={**dataset, "onTooLong": "Drop"}).dataset
    assert (dropped.samples, dropped.truncated, dropped.dropped) == (1, 0, 2)
    with pytest.raises(
        RunFailure,
        match=r"2 samples are longer than training.maxLength \(64 tokens\)(.|\n)*train.jsonl:2: has 225 tokens",
    ):
        run_prepare(bucket, endpoint, dataset={**dataset, "onTooLong": "Fail"})


def test_a_folder_of_packed_files_is_one_dataset(bucket: Store, endpoint: str) -> None:
    bucket.put_bytes("data/part-1.jsonl.gz", gzip.compress(jsonl([chat(0), chat(1)])))
    bucket.put_bytes("data/part-2.jsonl.gz", gzip.compress(jsonl([chat(2)])))
    bucket.put_bytes("data/README.md", b"# about")
    prepared = run_prepare(bucket, endpoint, dataset={"train": {"s3": {"uri": bucket.uri("data")}}})
    assert prepared.dataset.samples == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"s3": {"uri": "s3://no-such-bucket/x"}},
            "dataset.train.s3.uri: there is no bucket for s3://no-such-bucket/x",
        ),
        (
            {"s3": {"uri": "s3://finetune/nothing.jsonl"}},
            "dataset.train.s3.uri: there is nothing at s3://finetune/nothing.jsonl",
        ),
        (
            {"configMap": {"name": "facts", "key": "x.jsonl"}},
            "dataset.train.configMap: ConfigMap facts has no key 'x.jsonl'",
        ),
    ],
)
def test_a_missing_dataset_is_named(bucket: Store, endpoint: str, source: dict[str, Any], message: str) -> None:
    with pytest.raises(RunFailure) as caught:
        run_prepare(bucket, endpoint, dataset={"train": source})
    assert caught.value.reason == "DatasetNotFound"
    assert message in caught.value.message


def test_a_base_model_without_weights_is_refused(bucket: Store, endpoint: str) -> None:
    dataset = put_rows(bucket, [chat(0)])
    bucket.delete("base/model.safetensors")
    bucket.put_bytes("base/pytorch_model.bin", b"pickle")
    with pytest.raises(RunFailure, match=r"only as pickle \(pytorch_model.bin\), which is never read") as caught:
        run_prepare(bucket, endpoint, dataset=dataset)
    assert caught.value.reason == "UnsupportedCombination"


def test_a_tokenizer_that_is_another_models_is_refused(bucket: Store, endpoint: str) -> None:
    config = json.loads(bucket.get_bytes("base/config.json"))
    bucket.put_json("base/config.json", config | {"vocab_size": 200})
    with pytest.raises(
        RunFailure, match=r"its tokenizer makes ' beta' token \d+, but vocab_size in config.json is 200;"
    ):
        run_prepare(bucket, endpoint, dataset=put_rows(bucket, [{"text": "x beta"}]))


def test_weights_are_hashed_once(bucket: Store, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = put_rows(bucket, [chat(0), chat(1)])
    first = run_prepare(bucket, endpoint, dataset=dataset)
    monkeypatch.setattr(Store, "hash_object", lambda *_: pytest.fail("hashed again"))
    assert run_prepare(bucket, endpoint, dataset=dataset) == first


def test_unknown_targets_are_refused_with_those_that_exist(bucket: Store, endpoint: str) -> None:
    dataset = put_rows(bucket, [chat(0), chat(1)])
    with pytest.raises(
        RunFailure,
        match="method.lora.targetModules: c_attn names no layer of this llama model; its linear layers are q_proj",
    ):
        run_prepare(
            bucket, endpoint, dataset=dataset, method={"type": "LoRA", "lora": {"targetModules": ["c_attn", "q_proj"]}}
        )


def test_a_gguf_export_that_could_not_be_made_is_refused_before_a_gpu_is_asked_for(
    bucket: Store, endpoint: str
) -> None:
    """And one that can be, tokenizer and all, is not."""
    dataset = put_rows(bucket, [chat(0), chat(1)])
    run_prepare(bucket, endpoint, dataset=dataset, output={"exports": ["GGUF"]})
    config = json.loads(bucket.get_bytes("base/config.json"))
    bucket.put_json("base/config.json", {**config, "model_type": "gpt_neox"})
    with pytest.raises(RunFailure, match="GGUF is not made of model type 'gpt_neox', only of llama, mistral") as caught:
        run_prepare(bucket, endpoint, dataset=dataset, output={"exports": ["GGUF"]})
    assert caught.value.reason == "UnsupportedCombination"


@pytest.mark.parametrize("objective", ["DPO", "ORPO", "Reward"])
def test_preferences_become_a_prompt_and_two_answers(
    bucket: Store, endpoint: str, tmp_path: Path, objective: str
) -> None:
    rows = [{"prompt": f"alpha {n}", "chosen": f" beta {n}", "rejected": " gamma"} for n in range(5)]
    dataset = {**put_rows(bucket, rows), "evaluation": {"fraction": 0.2}}
    prepared = run_prepare(bucket, endpoint, dataset=dataset, objective={"type": objective})
    assert (prepared.dataset.format, prepared.dataset.samples, prepared.dataset.evaluation_samples) == (
        "Preference",
        4,
        1,
    )
    first = download(bucket, prepared, tmp_path / "dataset")[0]
    tokenizer = load_tokenizer(basemodel.download(bucket, prepared.base_model, tmp_path / "model"))
    shown = {name: tokenizer.decode(ids) for name, ids in first.items()}
    number = shown["prompt_ids"].removeprefix("alpha ")
    assert shown == {"prompt_ids": f"alpha {number}", "chosen_ids": f" beta {number}</s>", "rejected_ids": " gamma</s>"}


def test_judged_answers_become_a_prompt_an_answer_and_a_label(bucket: Store, endpoint: str, tmp_path: Path) -> None:
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
    )
    rows = [
        {"prompt": [user], "completion": [good], "label": True},
        {"prompt": [user], "completion": [bad], "label": False},
    ]
    prepared = run_prepare(bucket, endpoint, dataset=put_rows(bucket, rows), objective={"type": "KTO"})
    assert prepared.dataset.format == "UnpairedPreference"
    made = download(bucket, prepared, tmp_path / "dataset")
    tokenizer = load_tokenizer(basemodel.download(bucket, prepared.base_model, tmp_path / "model"))
    assert [
        (tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["completion_ids"]), row["label"]) for row in made
    ] == [
        ("[user] a</s>[assistant] ", "b</s>", True),
        ("[user] a</s>[assistant] ", "c</s>", False),
    ]


def test_kto_needs_good_and_bad_answers(bucket: Store, endpoint: str) -> None:
    rows = [{"prompt": f"alpha {n}", "completion": " beta", "label": True} for n in range(3)]
    with pytest.raises(RunFailure, match="label is true in all 3 rows; add rows with label false"):
        run_prepare(bucket, endpoint, dataset=put_rows(bucket, rows), objective={"type": "KTO"})


def test_good_and_bad_answers_that_weigh_too_differently_are_said_with_a_weight_that_evens_them(
    bucket: Store, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"alpha {n}", "completion": " beta", "label": n == 0} for n in range(5)]
    dataset = put_rows(bucket, rows)
    run_prepare(bucket, endpoint, dataset=dataset, objective={"type": "KTO"})
    assert "20 % of the answers are good" in caplog.text and "set objective.desirableWeight to 4" in caplog.text
    caplog.clear()
    run_prepare(bucket, endpoint, dataset=dataset, objective={"type": "KTO", "desirableWeight": 4})
    assert "answers are good" not in caplog.text


def test_a_pair_that_is_cut_before_its_answers_part_is_dropped(bucket: Store, endpoint: str) -> None:
    same = " beta" * 30
    rows = [{"prompt": "alpha", "chosen": same + end, "rejected": same + " delta"} for end in (" one", " two")]
    rows.append({"prompt": "alpha", "chosen": " one", "rejected": " two"})
    prepared = run_prepare(
        bucket, endpoint, dataset=put_rows(bucket, rows), objective={"type": "DPO"}, training={"maxLength": 24}
    )
    assert (prepared.dataset.samples, prepared.dataset.dropped) == (1, 2)


def test_rows_of_another_objective_are_refused_with_what_they_are(bucket: Store, endpoint: str) -> None:
    with pytest.raises(RunFailure, match=r"they look like rows for objective.type: SFT. objective.type: DPO needs"):
        run_prepare(bucket, endpoint, dataset=put_rows(bucket, [chat(0), chat(1)]), objective={"type": "DPO"})


def put_finished_run(bucket: Store, prepared: PrepareResult, folder: Path) -> str:
    """What a finished train Job of this run leaves; returns the adapter's digest."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    digest = tree_digest(hash_tree(folder))
    prefix = f"adapters/{digest.removeprefix('sha256:')}"
    bucket.upload_tree(folder, prefix)
    adapter = AdapterStatus(uri=bucket.uri(prefix), digest=digest, rank=4, run_id=prepared.run_id)
    evaluation = EvaluationStatus(base={"loss": 2.0}, adapter={"loss": 1.0}, passed=True)
    result = TrainResult(adapter=adapter, evaluation=evaluation, steps=8)
    bucket.put_json(f"runs/{prepared.run_id}/result.json", result.model_dump(mode="json", by_alias=True))
    return digest


def test_a_run_that_was_done_before_is_reused_and_judged_by_the_gates_of_now(
    bucket: Store, endpoint: str, tmp_path: Path
) -> None:
    dataset = put_rows(bucket, [chat(n) for n in range(10)])
    first = run_prepare(bucket, endpoint, dataset=dataset)
    assert first.reused is None
    digest = put_finished_run(bucket, first, tmp_path / "adapter")
    again = run_prepare(bucket, endpoint, dataset=dataset)
    assert again.reused
    assert again.reused.adapter.digest == digest
    strict = run_prepare(bucket, endpoint, dataset=dataset, evaluation={"gates": [{"metric": "loss", "max": 0.5}]})
    assert strict.reused
    assert strict.reused.adapter.gate_passed is False
    other = run_prepare(bucket, endpoint, dataset=dataset, training={"seed": 7})
    assert other.reused is None


def test_a_run_whose_adapter_is_not_whole_any_more_is_trained_again(
    bucket: Store, endpoint: str, tmp_path: Path
) -> None:
    dataset = put_rows(bucket, [chat(n) for n in range(10)])
    digest = put_finished_run(bucket, run_prepare(bucket, endpoint, dataset=dataset), tmp_path / "adapter")
    bucket.delete(f"adapters/{digest.removeprefix('sha256:')}/adapter_model.safetensors")
    assert run_prepare(bucket, endpoint, dataset=dataset).reused is None


def test_prepare_starts_without_torch_and_transformers() -> None:
    code = (
        "import sys, finetune_trainer.prepare; print({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("objective", ["SFT", "KTO"])
def test_rows_are_read_and_written_without_pandas(tmp_path: Path, objective: str) -> None:
    """pyarrow would import it for pa.array, which takes a second."""
    make_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    rows = [{"prompt": "alpha", "completion": word, "label": word == "beta"} for word in ("beta", "gamma")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    code = (
        "import sys; from finetune_trainer.command.cli import main; "
        "code = main(sys.argv[1:]); print(code, {'torch', 'transformers', 'pandas'} & set(sys.modules))"
    )
    command = [
        "check-data",
        str(tmp_path / "rows.parquet"),
        "--model",
        str(tmp_path / "model"),
        "--objective",
        objective,
    ]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()", done.stderr


def test_sigterm_ends_prepare_at_once_even_while_it_waits_for_the_store(tmp_path: Path) -> None:
    storage = Storage(uri="s3://finetune", endpoint="http://127.0.0.1:9")
    run = RunSpec(stage="prepare", namespace="demo", name="t", job="j", spec=finetune_spec(), storage=storage)
    (tmp_path / "spec.json").write_text(run.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "finetune_trainer", "prepare", "--spec", str(tmp_path / "spec.json")]
    environment = {**os.environ, "FINETUNE_WORK": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout
        line = next(line for line in job.stdout if "WARNING" in line)
        assert "storage: listing s3://" in line or "storage: looking for s3://" in line
        assert "http://127.0.0.1:9" in line
        assert "trying again for 180 s more" in line
        job.terminate()
        assert job.wait(timeout=60) == 143
