"""The train stage, end to end on tiny models against a real MinIO."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api.finetunestatus import ProgressStatus
from finetune_operator.api.tracking import Tracking
from finetune_trainer.digest import canonical_json, sha256_hex
from finetune_trainer.storage.store import Store
from tests.tracking_servers import FakeMLflow, served

from .bucket import RUN, RUN_ID, Bench
from .minio_server import minio_server
from .tiny import finetune_spec, make_rows, write_dataset

pytestmark = pytest.mark.timeout(600)  # seconds on a quiet machine


@pytest.fixture
def bench(endpoint: str, tiny_llama: Path, tmp_path: Path) -> Bench:
    dataset = write_dataset(tmp_path / "data", make_rows(24), make_rows(6, seed=1))
    return Bench(endpoint, tiny_llama, dataset, tmp_path / "work", evaluation=6)


def test_lora_learns_and_leaves_an_adapter_that_anyone_can_verify(bench: Bench, tmp_path: Path) -> None:
    result = bench.train(finetune_spec(training={"maxSteps": 20}))

    assert result.evaluation.adapter["loss"] < result.evaluation.base["loss"]
    assert bench.losses()[-1] < bench.losses()[0]
    folder = tmp_path / "adapter"
    manifest = bench.store.at(result.adapter.uri).download_tree("", folder, result.adapter.digest)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [
        {"path": str(p.relative_to(folder)), "sha256": sha256_hex(p.read_bytes()), "size": p.stat().st_size}
        for p in files
    ]
    assert result.adapter.digest == "sha256:" + sha256_hex(canonical_json(listed))
    assert {file.name for file in files} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert manifest["baseModel"]["digest"] == bench.prepared.base_model.digest
    assert manifest["prompts"]
    assert result.adapter.rank == 4 and result.adapter.trainable_parameters > 0


QLORA = {"type": "QLoRA", "lora": {"rank": 4, "alpha": 8}}


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ({"type": "LoRA"}, "adamw_torch"),
        (QLORA, "adamw_torch"),
        (QLORA, "paged_adamw_8bit"),
        ({"type": "LoRA"}, "adafactor"),
    ],
)
def test_a_resumed_run_has_bitwise_the_losses_and_the_adapter_of_an_uninterrupted_one(
    bench: Bench, method: dict[str, Any], optimizer: str
) -> None:
    spec = finetune_spec(method=method, training={"optimizer": optimizer}, checkpoint={"every": 3, "keep": 9})
    whole = bench.train(spec)
    losses = bench.losses()
    bench.store.delete(f"{RUN}/result.json")
    for step in bench.steps():
        if step > 3:
            bench.store.delete(f"{RUN}/checkpoints/step-{step}")
    assert bench.steps() == [3]
    resumed = bench.train(spec)
    assert resumed.resumed_from_step == 3
    assert bench.losses() == losses
    assert resumed.adapter.digest == whole.adapter.digest


class At:
    """Listens where an operator does, and does something at one step."""

    def __init__(self, step: int, what: Callable[[], object]) -> None:
        self.step, self.what = step, what
        self.micro_batch = 0

    def begins(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch

    def due(self) -> bool:
        return True

    def progress(self, progress: ProgressStatus) -> bool:
        if progress.step == self.step:
            self.what()
        return True


def test_the_effective_batch_is_the_same_however_it_is_cut(bench: Bench) -> None:
    no_dropout = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8, "dropout": 0}}
    losses = []
    for micro_batch in (4, 1, 3):
        bench.train(finetune_spec(method=no_dropout), micro_batch=micro_batch)
        losses.append(bench.losses())
        bench.store.delete(RUN)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[2] == pytest.approx(losses[0], abs=1e-4)


def test_a_corrupt_or_half_written_checkpoint_is_skipped_with_a_log_line(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    spec = finetune_spec(checkpoint={"every": 2, "keep": 9})
    whole = bench.train(spec)
    losses = bench.losses()
    bench.store.delete(f"{RUN}/result.json")
    bench.store.delete(f"{RUN}/checkpoints/step-8/manifest.json")
    bench.store.put_bytes(f"{RUN}/checkpoints/step-6/trainable.safetensors", b"not what the manifest lists")
    caplog.set_level("WARNING")
    resumed = bench.train(spec)
    assert resumed.resumed_from_step == 4
    assert "step-8 is incomplete" in caplog.text
    assert "step-6 cannot be trusted" in caplog.text
    assert bench.losses() == losses
    assert resumed.adapter.digest == whole.adapter.digest


def test_a_bucket_that_is_gone_fails_the_run_and_one_that_comes_back_has_its_last_checkpoint(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.failures import RunFailure
    from finetune_trainer.train import train

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")  # the server below sets them; monkeypatch restores the session's
    spec, dataset = finetune_spec(), write_dataset(tmp_path / "data", make_rows(24))

    def close_after_the_first_checkpoint() -> None:
        while not bench.store.exists(f"{RUN}/checkpoints/step-3/manifest.json"):  # its upload runs beside the steps
            time.sleep(0.01)
        server.close()

    with ExitStack() as server:
        endpoint = server.enter_context(minio_server(tmp_path / "minio"))
        bench = Bench(endpoint, tiny_llama, dataset, tmp_path / "work")
        bench.train(spec)
        losses = bench.losses()
        bench.store.delete(RUN)
        impatient = Store(bench.storage, wait_seconds=1)
        with pytest.raises(RunFailure, match="did not answer for 1 s") as caught:
            train(bench.run_spec(spec), impatient, tmp_path / "gone", At(5, close_after_the_first_checkpoint))
        assert caught.value.reason == "StorageUnavailable"
    with minio_server(tmp_path / "minio", port=int(endpoint.rpartition(":")[2])):
        assert bench.train(spec).resumed_from_step == 3
        assert bench.losses() == losses


def test_only_the_newest_checkpoints_are_kept(bench: Bench) -> None:
    bench.train(finetune_spec(checkpoint={"every": 1, "keep": 3}))
    assert bench.steps() == [6, 7, 8]


def test_a_finished_run_is_not_trained_again_but_judged_by_the_gates_of_now(bench: Bench) -> None:
    from finetune_trainer.train import main

    spec = finetune_spec()
    first = bench.train(spec)
    assert first.adapter.gate_passed
    strict = finetune_spec(evaluation={"gates": [{"metric": "loss", "max": 0.001}]})
    again = main(bench.run_spec(strict)).trained
    assert again is not None
    assert again.adapter.digest == first.adapter.digest
    assert again.adapter.gate_passed is False
    assert again.evaluation is not None
    assert "loss" in again.evaluation.gates[0].message


def test_an_upload_that_is_cut_off_leaves_no_adapter(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.failures import RunFailure

    put_file = bench.store.put_file

    def cut_off(key: str, path: Path) -> None:
        if key.endswith("tokenizer.json"):
            raise RunFailure("UploadFailed", "the connection is gone")
        put_file(key, path)

    monkeypatch.setattr(bench.store, "put_file", cut_off)
    with pytest.raises(RunFailure, match="connection is gone"):
        bench.train(finetune_spec())
    keys = [entry.key for entry in bench.store.list("adapters")]
    assert keys
    assert not [key for key in keys if key.endswith("manifest.json")]
    assert not bench.store.exists(f"{RUN}/result.json")


def test_a_loss_that_is_not_finite_fails_with_a_hint(endpoint: str, tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from finetune_trainer.failures import RunFailure

    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][7] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    bench = Bench(endpoint, broken, write_dataset(tmp_path / "data", make_rows(4)), tmp_path / "work")
    with pytest.raises(RunFailure, match=r"training\.learningRate") as caught:
        bench.train(finetune_spec())
    assert caught.value.reason == "NonFiniteLoss"


def test_a_gpu_that_was_asked_for_and_is_not_there_is_a_failure_unless_it_is_pretend(bench: Bench) -> None:
    from finetune_trainer.failures import RunFailure

    spec = finetune_spec(resources={"gpus": 1})
    with pytest.raises(RunFailure) as caught:
        bench.train(spec)
    assert caught.value.reason == "GPUNotVisible"
    assert bench.train(spec, pretend_gpu=True).steps == 8


def test_samples_are_answered_by_base_and_adapter(bench: Bench) -> None:
    from finetune_trainer.results.outcome import finished_result

    asked = finetune_spec(evaluation={"samples": ["alpha beta"]}, training={"maxSteps": 2})
    result = bench.train(asked)
    (told,) = bench.store.get_json(f"{RUN}/samples.json")
    assert told["prompt"] == "alpha beta"
    assert set(told) == {"prompt", "base", "adapter"}
    page = bench.store.get_bytes(f"{RUN}/report.html").decode()
    assert "alpha beta" in page and result.adapter.digest in page
    assert bench.store.exists(f"{RUN}/tensorboard/events.out.tfevents.0.finetune")
    assert result.report == bench.store.uri(f"{RUN}/report.html")
    assert finished_result(bench.store, bench.run_spec(asked)) == result
    more = finetune_spec(evaluation={"samples": ["alpha beta", "gamma"]}, training={"maxSteps": 2})
    assert finished_result(bench.store, bench.run_spec(more)) is None, "a new prompt is answered from the checkpoint"


def test_a_run_that_fails_late_leaves_its_report(bench: Bench) -> None:
    from finetune_trainer.failures import RunFailure
    from finetune_trainer.page.story import Story
    from finetune_trainer.results.outcome import write_failed_report

    story = Story(bench.run_spec(finetune_spec()))
    write_failed_report(bench.store, story, RunFailure("GPUNotVisible", "no GPU"))
    assert not bench.store.exists(f"{RUN}/report.html"), "before the first step there is nothing to tell"
    story.metrics = [{"step": 1, "loss": 2.0}]
    write_failed_report(bench.store, story, RunFailure("NonFiniteLoss", "the loss became nan"))
    assert "the loss became nan" in bench.store.get_bytes(f"{RUN}/report.html").decode()


def _command(bench: Bench, spec: Any, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The trainer as the Job runs it."""
    file = tmp_path / "spec.json"
    file.write_text(bench.run_spec(spec).model_dump_json(by_alias=True, exclude_none=True))
    environment = {
        **os.environ,
        "FINETUNE_WORK": str(tmp_path / "job"),
        "TERMINATION_LOG": str(tmp_path / "termination"),
    }
    return [sys.executable, "-m", "finetune_trainer", "train", "--spec", str(file)], environment


def test_sigterm_saves_a_checkpoint_after_the_step_and_the_next_attempt_goes_on_bitwise(
    bench: Bench, tmp_path: Path
) -> None:
    spec = finetune_spec(training={"maxSteps": 400}, checkpoint={"every": 1000})
    command, environment = _command(bench, spec, tmp_path)
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    for line in job.stdout:
        if "first step" in line:
            break
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 143
    (step,) = bench.steps()
    interrupted = bench.losses()
    assert len(interrupted) == step < 400
    resumed = bench.train(spec)
    assert resumed.resumed_from_step == step
    assert bench.losses()[:step] == interrupted
    losses = bench.losses()
    bench.store.delete(RUN)
    bench.train(spec)
    assert bench.losses() == losses


def test_sigterm_during_the_last_step_ends_the_attempt_before_it_evaluates(bench: Bench) -> None:
    from finetune_trainer.stage import Interrupted
    from finetune_trainer.train import train

    spec, at_the_end = finetune_spec(), At(8, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="interrupted after step 8/8; its checkpoint is saved"):
        train(bench.run_spec(spec), bench.store, bench.work, at_the_end)
    assert 0 < at_the_end.micro_batch <= spec.training.batch_size
    assert bench.train(spec).resumed_from_step == 8


def test_the_job_leaves_its_result_in_the_termination_message(bench: Bench, tmp_path: Path) -> None:
    command, environment = _command(bench, finetune_spec(training={"maxSteps": 2}), tmp_path)
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0
    result = json.loads((tmp_path / "termination").read_text())
    assert result["runId"] == RUN_ID
    assert result["trained"]["adapter"]["gatePassed"] is True
    assert len((tmp_path / "termination").read_bytes()) <= 4096


def test_an_interrupted_run_is_one_run_in_mlflow_and_no_step_is_there_twice(bench: Bench) -> None:
    with served(FakeMLflow()) as mlflow:
        asked = Tracking.model_validate({"mlflow": {"uri": mlflow.url}})
        spec = finetune_spec(checkpoint={"every": 3, "keep": 9})
        bench.train(spec, tracking=asked)
        bench.store.delete(f"{RUN}/result.json")
        for step in bench.steps():
            if step > 3:
                bench.store.delete(f"{RUN}/checkpoints/step-{step}")
        result = bench.train(spec, tracking=asked)
    assert result.resumed_from_step == 3
    [run] = mlflow.runs.values()
    assert run["info"]["status"] == "FINISHED" and run["info"]["run_name"] == "demo/tiny"
    assert [one["step"] for one in mlflow.history if one["key"] == "train/loss"] == list(range(1, 9))
    assert [one["value"] for one in mlflow.history if one["key"] == "train/loss"] == bench.losses()
    tags = {pair["key"]: pair["value"] for pair in run["data"]["tags"]}
    assert (tags["finetune.dev/adapter"], tags["finetune.dev/attempt"]) == (result.adapter.digest, "2")
    [told] = result.tracking
    assert told.message == "" and told.url in bench.store.get_bytes(f"{RUN}/report.html").decode()


def test_a_tracker_that_is_away_costs_the_run_nothing_and_is_told_of(bench: Bench) -> None:
    result = bench.train(finetune_spec(), tracking=Tracking.model_validate({"mlflow": {"uri": "http://127.0.0.1:9"}}))
    assert result.steps == 8
    [told] = result.tracking
    assert "8 of 8 steps are missing there" in told.message
    assert "8 of 8 steps are missing there" in bench.store.get_bytes(f"{RUN}/report.html").decode()
