"""Our trainer beside a plain loop and `trl sft` on this machine's CPU: speed, time to the first step, memory, losses.

    python -m bench.trainer [--rounds 3] [--steps 4] [--peers] [--isa avx2] [--smoke]

All contestants run in turn, round after round, and what counts is the ratio of medians: a machine that is busy is busy
for all. Tokens are those of the samples; padding is not work that anyone asked for. Ends with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.trainer.contestants import OUR_STEPS, Contestant, naive, trl_sft
from bench.trainer.ours import Ours
from bench.trainer.process import Failed, Trace, watch
from bench.trainer.results import Results
from bench.trainer.workload import Recipe, in_order_of_training, make_model, make_rows, write_rows
from finetune_trainer.training.precision import cpu_has_bf16
from tests.unit.trainer.minio_server import minio_binary, minio_server

ROWS = 2000
LONGEST_RUN = 300.0  # seconds
ISAS = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps of each run; the first is not in the speed"
    )
    parser.add_argument("--peers", action="store_true", help="against LLaMA-Factory and Axolotl, where they install")
    parser.add_argument("--isa", choices=ISAS, help="hold everybody's kernels to what an older CPU has")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round: does it work?")
    parser.add_argument("--logs", type=Path, help="keep what every run said in this folder")
    options = parser.parse_args()
    if minio_binary() is None:
        sys.exit("no minio: run `make cluster-binaries`")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    os.environ.update(ISAS.get(options.isa, {}))
    recipe = Recipe(steps=options.steps)
    with tempfile.TemporaryDirectory(prefix="bench-trainer-") as scratch:
        work = Path(scratch)
        logs = options.logs or work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        parameters = make_model(work / "model", tiny=options.smoke)
        rows = make_rows(200 if options.smoke else ROWS)
        write_rows(work / "rows.jsonl", rows)
        write_rows(work / "ordered" / "train.jsonl", in_order_of_training(rows, recipe))
        print(f"{parameters / 1e6:.1f}M parameters, {len(rows)} rows, {recipe.steps} steps of {recipe.batch_size} rows")
        print(machine(), flush=True)
        with minio_server(work / "minio") as endpoint:
            ours = Ours(endpoint, work / "model", work / "rows.jsonl", recipe, work, "Auto")
            contestants = [Contestant("finetune", ours.command, OUR_STEPS, ours.environment())]
            if options.peers:
                from bench.trainer.peers import installed

                contestants += installed(work, work / "model", work / "ordered", recipe)
            else:
                for build in (naive, trl_sft):
                    contestants.append(build(work / "model", work / "ordered", work / "output", recipe))
            results = Results()
            for number in range(1 if options.smoke else options.rounds):
                for contestant in rotated(contestants, number):
                    trace = run(contestant, logs / f"{contestant.name.replace(' ', '-')}-{number + 1}.log")
                    if trace is None:
                        continue
                    if contestant.name == "finetune":
                        trace.losses, results.tokens = ours.losses(), ours.tokens()
                    results.add(contestant.name, trace)
        print(machine())
        return results.report(cpu_has_bf16())


def rotated(contestants: list[Contestant], by: int) -> list[Contestant]:
    """Another order every round, so that nobody is always first."""
    start = by % len(contestants)
    return contestants[start:] + contestants[:start]


def run(contestant: Contestant, log: Path) -> Trace | None:
    # A thread that waits must not take the CPU from one that works, when the machine has other things to do too.
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "passive"}
    environment = {**threads, "HF_HUB_OFFLINE": "1", **contestant.environment}
    begun = time.monotonic()
    try:
        trace = watch(contestant.command(), contestant.signs, environment, log, LONGEST_RUN)
    except Failed as failure:
        print(f"  {contestant.name}: did not run, not counted. {failure}", flush=True)
        return None
    print(
        f"  {contestant.name}: {time.monotonic() - begun:.0f} s, first step after {trace.first_step:.1f} s, "
        f"then {trace.loop_seconds:.1f} s",
        flush=True,
    )
    return trace


def machine() -> str:
    """CPU, cores, date and load: a ratio is about this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    kind = "with bf16 instructions" if cpu_has_bf16() else "without bf16 instructions"
    held = " ".join(f"{name}={os.environ[name]}" for name in ISAS["avx2"] if name in os.environ)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {name}, {os.cpu_count()} cores, {kind} {held}; load {load}"


if __name__ == "__main__":
    sys.exit(main())
