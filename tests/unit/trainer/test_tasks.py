"""Tasks of lm-eval: what is refused and why, what prepare leaves in the bucket, and what train makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from finetune_operator.api.evaluation import Evaluation
from finetune_trainer.evaluation.gates import judge
from finetune_trainer.evaluation.tasks import catalogue
from finetune_trainer.evaluation.tasks.fetch import leave_tasks
from finetune_trainer.evaluation.tasks.results import METRICS, Comparison, Measured, scores
from finetune_trainer.failures import RunFailure
from finetune_trainer.runspec import Storage
from finetune_trainer.storage.store import Store

from .tiny import WORDS

FOLDERS = ["arc", "gsm8k", "glue", "humaneval", "squadv2", "wikitext", "mmlu/default", "benchmarks", "babilong"]


def choices(count: int) -> Dataset:
    """Rows as those of ARC: which word is the next one."""
    return Dataset.from_list(
        [
            {
                "id": str(number),
                "question": f"{WORDS[number % 12]} {WORDS[number % 12 + 1]}",
                "choices": {"text": [WORDS[(number + step) % 17] for step in (2, 5, 7, 9)], "label": list("ABCD")},
                "answerKey": "A",
            }
            for number in range(count)
        ]
    )


def sums(count: int) -> Dataset:
    """Rows as those of GSM8K."""
    return Dataset.from_list(
        [{"question": f"{WORDS[number % 12]} one two", "answer": f"so #### {number}"} for number in range(count)]
    )


ARC = DatasetDict(train=choices(6), validation=choices(4), test=choices(9))
GSM8K = DatasetDict(train=sums(8), test=sums(5))
DATA = {"allenai/ai2_arc": ARC, "openai/gsm8k": GSM8K}


def evaluation(*tasks: dict[str, Any], gates: tuple[dict[str, Any], ...] = ()) -> Evaluation:
    return Evaluation.model_validate({"tasks": list(tasks), "gates": list(gates)})


@pytest.fixture(scope="module")
def manager() -> Any:
    return catalogue.tasks_in(FOLDERS)


@pytest.fixture
def bucket(tmp_path: Path) -> Store:
    return Store(Storage(uri=f"file://{tmp_path}/bucket"))


def leave(asked: Evaluation, manager: Any, bucket: Store, folder: Path) -> Any:
    return leave_tasks(asked, manager, lambda config: DATA[config.dataset_path], bucket, folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("arc_esay", "is no task of lm-eval 0.4.13; did you mean arc_easy"),
        ("glue", "is a label of tasks without a score together; name some of them: cola, "),
        ("openllm", "is a group without a score of its own; name some of its tasks: "),
        ("squadv2", "is a program that fetches its own data"),
        ("humaneval", "runs programs that the model writes"),
        ("babilong_qa1", "makes its data with a program"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_with_what_to_ask_instead(manager: Any, name: str, why: str) -> None:
    with pytest.raises(RunFailure) as caught:
        catalogue.check(evaluation({"name": name}).tasks, manager.task_index)
    assert caught.value.reason == "InvalidTask"
    assert caught.value.message.startswith(f"evaluation.tasks: {name} {why}")


def test_a_group_is_its_tasks_and_where_they_are_defined(manager: Any) -> None:
    assert len(list(catalogue.leaves("mmlu", manager.task_index))) == 57
    assert catalogue.folders_of("mmlu", manager.task_index) == {"mmlu/default"}
    catalogue.check(evaluation({"name": "mmlu"}).tasks, manager.task_index)


def test_the_bucket_has_what_is_asked_and_no_more(manager: Any, bucket: Store, tmp_path: Path) -> None:
    asked = evaluation({"name": "arc_easy", "limit": 3}, {"name": "gsm8k", "fewShot": 2})
    status = leave(asked, manager, bucket, tmp_path / "files")
    assert status.questions == 3 + 5
    folder = tmp_path / "read"
    bucket.at(status.uri).download_tree("", folder, status.digest)
    rows = {
        path.relative_to(folder).as_posix(): len(Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")))
        for path in folder.rglob("*.parquet")
    }
    assert rows == {
        "arc_easy/test.parquet": 3,
        "arc_easy/train.parquet": 1,  # no examples are shown
        "gsm8k/test.parquet": 5,
        "gsm8k/train.parquet": 8,
    }
    listed = json.loads((folder / "tasks.json").read_text())
    assert listed["folders"] == ["arc", "gsm8k"]
    again = leave(asked, manager, bucket, tmp_path / "again")
    assert again == status
    other = leave(evaluation({"name": "arc_easy", "limit": 2}), manager, bucket, tmp_path / "other")
    assert other.digest != status.digest


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            evaluation({"name": "arc_easy"}, gates=({"metric": "arc_easy/acc_nrm", "min": 0.5},)),
            "evaluation.gates: arc_easy/acc_nrm is not measured; arc_easy has arc_easy/acc, arc_easy/acc_norm: use one",
        ),
        (
            evaluation({"name": "gsm8k"}, gates=({"metric": "gsm8k/exact_match", "min": 0.5},)),
            "gsm8k has gsm8k/exact_match,strict-match, gsm8k/exact_match,flexible-extract: use one of them",
        ),
        (
            evaluation({"name": "gsm8k", "fewShot": 9}),
            "evaluation.tasks: gsm8k cannot be asked: ",
        ),
    ],
)
def test_what_would_fail_after_training_fails_before_it(
    manager: Any, bucket: Store, tmp_path: Path, asked: Evaluation, message: str
) -> None:
    with pytest.raises(RunFailure) as caught:
        leave(asked, manager, bucket, tmp_path / "files")
    assert caught.value.reason == "InvalidTask"
    assert message in caught.value.message


def test_a_missing_package_is_named(manager: Any, bucket: Store, tmp_path: Path) -> None:
    def unread(config: Any) -> DatasetDict:
        raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    with pytest.raises(RunFailure, match="arc_easy needs the Python package langdetect, which the trainer image does"):
        leave_tasks(evaluation({"name": "arc_easy"}), manager, unread, bucket, tmp_path / "files")


def test_the_filter_is_named_where_a_metric_has_several() -> None:
    found = {
        "results": {
            "sums": {
                "name": "sums", "alias": "sums", "sample_len": 4, "em,strict": 0.25, "em_stderr,strict": 0.1,
                "em,loose": 0.5, "em_stderr,loose": "N/A", "ppl,none": 9.0, "odd,none": float("nan"),
            }
        },
        "higher_is_better": {"sums": {"em": True, "ppl": False}},
    }  # fmt: skip
    told = scores("sums", found)
    assert [(one.metric, one.value, one.error, one.lower) for one in told] == [
        ("sums/em,strict", 0.25, 0.1, False),
        ("sums/em,loose", 0.5, None, False),
        ("sums/ppl", 9.0, None, True),
    ]


def test_status_has_room_for_the_gates_metrics_first() -> None:
    many = Measured("sha256:0", [Comparison(f"t/m{number}", 1, False, 0.1, 0.2) for number in range(99)])
    gates = evaluation({"name": "t"}, gates=({"metric": "t/m98", "min": 0.1},)).gates
    kept = [one.metric for one in many.kept(gates)]
    assert len(kept) == METRICS
    assert kept[-1] == "t/m98"


def test_less_is_better_where_the_task_says_so() -> None:
    gates = evaluation({"name": "t"}, gates=({"metric": "t/ppl", "betterThanBase": True},)).gates
    judged = judge(gates, {"t/ppl": 9.0}, {"t/ppl": 7.0}, ["t/ppl"])
    assert judged.passed is True
    assert judged.gates[0].message == "t/ppl 7 < 9 of the base model"
    assert judge(gates, judged.base, judged.adapter).passed is False
