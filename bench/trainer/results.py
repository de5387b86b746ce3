"""From the traces of all rounds to ratios, and from ratios to a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from bench.trainer.process import Trace

SPEED_OVER_PLAIN_BF16, SPEED_OVER_PLAIN, SPEED_OVER_TRL = 6.0, 3.5, 1.3
START, MEMORY = 0.7, 1.0
FIRST_LOSS, MEAN_LOSS = 0.005, 0.01  # relative: float32 beside bf16, and other random adapters after the first step


@dataclass
class Results:
    """All runs by contestant. `tokens`: of the samples, up to and with each step."""

    tokens: list[int] = field(default_factory=list)
    runs: dict[str, list[Trace]] = field(default_factory=dict)

    def add(self, name: str, trace: Trace) -> None:
        self.runs.setdefault(name, []).append(trace)

    def figure(self, name: str, of: Callable[[Trace], float]) -> float:
        return median(of(trace) for trace in self.runs[name])

    def speed(self, name: str) -> float:
        """Useful tokens per second, first step left out."""
        return (self.tokens[-1] - self.tokens[0]) / self.figure(name, lambda trace: trace.loop_seconds)

    def cost(self, name: str) -> float:
        """CPU seconds per token of the same steps."""
        return self.figure(name, lambda trace: trace.loop_cpu_seconds) / (self.tokens[-1] - self.tokens[0])

    def table(self) -> list[str]:
        lines = [
            "",
            f"{'':14}{'tokens/s':>10}{'CPU ms/token':>14}{'ready s':>10}{'1st step s':>12}{'peak MB':>10}{'1st loss':>10}{'mean':>9}",
        ]
        for name in self.runs:
            losses = self.losses(name)
            lines.append(
                f"{name:14}{self.speed(name):>10.0f}{self.cost(name) * 1000:>14.1f}{self.figure(name, lambda t: t.ready or 0):>10.1f}"
                f"{self.figure(name, lambda t: t.first_step):>12.1f}"
                f"{self.figure(name, lambda t: t.peak_bytes) / 1e6:>10.0f}"
                f"{losses[0]:>10.4f}{sum(losses) / len(losses):>9.4f}"
            )
        return lines

    def losses(self, name: str) -> list[float]:
        return self.runs[name][0].losses

    def judge(self, what: str, value: float, target: float, at_least: bool = True) -> bool:
        met = value >= target if at_least else value <= target
        word = "at least" if at_least else "at most"
        print(f"{what:48}{value:>7.2f}  {word} {target:<5g} {'met' if met else 'MISSED'}")
        return met

    def report(self, has_bf16: bool) -> int:
        """Print everything; returns 1 when a target is missed, else 0."""
        print("\n".join(self.table()))
        print(f"\nratios of medians of {len(self.runs['finetune'])} rounds")
        mine, verdicts = "finetune", []
        if "plain loop" in self.runs:
            speed, target = (
                self.speed(mine) / self.speed("plain loop"),
                SPEED_OVER_PLAIN_BF16 if has_bf16 else SPEED_OVER_PLAIN,
            )
            verdicts.append(self.judge("tokens/s over the plain loop", speed, target))
            for what, of in {"ready": lambda t: t.ready or 0.0, "first step done": lambda t: t.first_step}.items():
                ratio = self.figure(mine, of) / self.figure("plain loop", of)
                verdicts.append(self.judge(f"seconds until {what}, of the plain loop's", ratio, START, at_least=False))
        if "trl sft" in self.runs:
            verdicts.append(
                self.judge("tokens/s over trl sft", self.speed(mine) / self.speed("trl sft"), SPEED_OVER_TRL)
            )
            memory = self.figure(mine, lambda t: t.peak_bytes) / self.figure("trl sft", lambda t: t.peak_bytes)
            verdicts.append(self.judge("peak memory, of trl sft's", memory, MEMORY, at_least=False))
        for name in self.runs.keys() - {mine}:
            print(f"{f'CPU time per token, {name} over ours':48}{self.cost(name) / self.cost(mine):>7.2f}")
            ready = self.figure(mine, lambda t: t.ready_cpu) / self.figure(name, lambda t: t.ready_cpu)
            print(f"{f'CPU time until ready, ours of that of {name}':48}{ready:>7.2f}")
        for name in self.runs.keys() - {mine, "plain loop", "trl sft"}:
            print(f"{f'tokens/s over {name}':48}{self.speed(mine) / self.speed(name):>7.2f}")
        verdicts += [self.same_losses(name) for name in self.runs if name != mine]
        return int(not all(verdicts))

    def same_losses(self, name: str) -> bool:
        """Whether it learned the same thing: the first loss, and the mean over the steps."""
        ours, theirs = self.losses("finetune"), self.losses(name)
        first = abs(theirs[0] / ours[0] - 1)
        mean = abs(sum(theirs) / len(theirs) / (sum(ours) / len(ours)) - 1)
        same = len(ours) == len(theirs) and first <= FIRST_LOSS and mean <= MEAN_LOSS
        print(
            f"losses of {name}: first {first:.2%} apart, mean {mean:.2%} apart: {'the same' if same else 'DIFFERENT'}"
        )
        return same
