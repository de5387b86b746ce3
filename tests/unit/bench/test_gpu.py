"""bench/gpu.py from end to end with a tiny model on the CPU."""

import json
from pathlib import Path

import pytest

from bench import gpu


def test_the_whole_path_runs_on_a_cpu_and_leaves_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--smoke", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [case["method"] for case in figures["cases"]] == ["LoRA", "QLoRA", "Full"]
    assert all(case["tokens_per_second"] > 0 and case["peak"] is None for case in figures["cases"])
    assert "tokens/s of full training" in capsys.readouterr().out


def test_an_estimate_far_from_the_peak_is_told() -> None:
    case = gpu.Measured("8B", "QLoRA", 4, False, 1000.0, 10.0, peak=10 * gpu.GIB, estimate=12 * gpu.GIB)
    assert case.apart == pytest.approx(0.2)
    assert "estimate 12.0 GiB (+20%)" in gpu.line(case)


def test_it_says_so_when_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main(["--models", "1B"])
    assert "sees no NVIDIA GPU" in capsys.readouterr().err
