"""Which number format a run computes in: bf16 only where the hardware has it, because emulated bf16 is 15 times slower."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finetune_trainer.failures import UNSUPPORTED_COMBINATION, RunFailure

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last one is how arm64 spells it


@dataclass(frozen=True)
class Precision:
    """`compute` names a torch dtype; the frozen base weights have it too, what is trained stays float32."""

    compute: str
    scaled: bool  # float16 needs loss scaling, its range is too small for gradients

    @property
    def autocast(self) -> bool:
        return self.compute != "float32"


DTYPES = {"BF16": "bfloat16", "FP16": "float16", "FP32": "float32"}


@cache
def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 in hardware; False where the kernel does not tell."""
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
