"""precision: Auto looks at the hardware."""

from pathlib import Path

import pytest

from finetune_trainer.failures import RunFailure
from finetune_trainer.training.precision import choose_precision, cpu_has_bf16


@pytest.mark.parametrize(
    ("flags", "found"),
    [("fpu avx2 fma", False), ("fpu avx512f avx512_bf16 gfni", True), ("amx_bf16 amx_tile", True)],
)
def test_a_cpu_has_bf16_only_with_its_instructions(flags: str, found: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    assert cpu_has_bf16(cpuinfo) is found


@pytest.mark.parametrize(("isa", "found"), [("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", True)])
def test_a_cpu_has_no_bf16_where_the_kernels_may_not_use_it(isa: str, found: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : avx2 avx512_bf16\n")
    assert cpu_has_bf16(cpuinfo, {"ONEDNN_MAX_CPU_ISA": isa}) is found


def test_an_unreadable_cpuinfo_means_no_bf16(tmp_path: Path) -> None:
    assert cpu_has_bf16(tmp_path / "none") is False


@pytest.mark.parametrize(
    ("requested", "device", "has_bf16", "compute"),
    [
        ("Auto", "cpu", True, "bfloat16"),
        ("Auto", "cpu", False, "float32"),
        ("Auto", "cuda", True, "bfloat16"),
        ("Auto", "cuda", False, "float16"),
        ("FP32", "cuda", True, "float32"),
        ("BF16", "cpu", False, "bfloat16"),
    ],
)
def test_auto_takes_bf16_where_it_is_fast(requested: str, device: str, has_bf16: bool, compute: str) -> None:
    assert choose_precision(requested, device, has_bf16).compute == compute


def test_only_fp16_is_scaled_and_only_on_a_gpu() -> None:
    assert choose_precision("FP16", "cuda", True).scaled
    assert not choose_precision("Auto", "cuda", True).scaled
    with pytest.raises(RunFailure, match=r"training\.precision"):
        choose_precision("FP16", "cpu", True)
