"""Which number format a run computes in: bf16 only where the hardware has it, because emulated bf16 is 15 times slower."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last one is how arm64 spells it
# What oneDNN, which multiplies for torch, may be held to (its variable ONEDNN_MAX_CPU_ISA) that has no bf16.
OLDER_ISAS = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})


@dataclass(frozen=True)
class Precision:
    """`compute` names a torch dtype; the frozen base weights have it too, what is trained stays float32."""

    compute: str
    scaled: bool  # float16 needs loss scaling, its range is too small for gradients

    @property
    def autocast(self) -> bool:
        return self.compute != "float32"


DTYPES = {"BF16": "bfloat16", "FP16": "float16", "FP32": "float32"}


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether bf16 is multiplied in this CPU's hardware; False where the kernel does not tell, or oneDNN may not."""
    if environment.get("ONEDNN_MAX_CPU_ISA", "").upper() in OLDER_ISAS:
        return False
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return not BF16_FLAGS.isdisjoint(flags.partition(":")[2].split())


def choose_precision(requested: str, device: str, has_bf16: bool) -> Precision:
    """The format for `training.precision` (Auto, BF16, FP16, FP32) on `device` (cpu or cuda).

    Raises: RunFailure for FP16 on a CPU, where half precision has neither speed nor range.
    """
    if requested == "FP16" and device == "cpu":
        raise RunFailure(
            UNSUPPORTED_COMBINATION,
            "training.precision: FP16 needs a GPU; on a CPU use Auto, BF16 or FP32",
        )
    if requested == "Auto":
        requested = "BF16" if has_bf16 else "FP16" if device == "cuda" else "FP32"
    return Precision(compute=DTYPES[requested], scaled=requested == "FP16")
