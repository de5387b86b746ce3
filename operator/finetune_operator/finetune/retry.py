"""Whether a failed attempt is followed by another, after which pause, and with what changed."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.api.finetunestatus import RunStatus
from finetune_operator.finetune import attempts
from finetune_operator.finetune.observe import Attempt
from finetune_operator.finetune.view import View
from finetune_operator.reasons import of_failure, with_hint

FIRST_PAUSE_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 300.0
# Something that interrupts a run over and over must not make the operator spin.
FREE_PAUSE_SECONDS = 2.0
CHANGES_KEPT = 32


@dataclass(frozen=True)
class Decision:
    """`again` after `pause` seconds from now with `run` as its book-keeping; `message` says so, or why not."""

    again: bool
    message: str
    pause: float = 0.0
    run: RunStatus | None = None


def decide(view: View, attempt: Attempt) -> Decision:
    """What follows a failed attempt, by the retry policy of its reason."""
    policy, run = of_failure(attempt.reason), view.run
    # An attempt that was given up has waited long enough.
    failed_at = attempt.waits_since if attempt.given_up else attempt.finished_at or view.now
    waited = (view.now - failed_at).total_seconds()
    if policy.retry == "free":
        freed = attempts.settled(view).model_copy(update={"disruptions": run.disruptions + 1})
        return Decision(True, attempt.message, FREE_PAUSE_SECONDS - waited, freed)
    if policy.retry == "unforeseen" and _came_again(view):
        return Decision(False, f"{attempt.message.rstrip('. ')}. Not tried again: a retry has not made a step either.")
    if policy.retry in ("infrastructure", "unforeseen"):
        limit, used = view.parent.spec.retry.infrastructure, run.infrastructure_retries
        if used >= limit:
            return Decision(False, _given_up(attempt.message, used, "infrastructure", limit))
        pause = min(FIRST_PAUSE_SECONDS * 2.0**used, LONGEST_PAUSE_SECONDS) - waited
        counted = attempts.settled(view).model_copy(update={"infrastructure_retries": used + 1})
        text = f"{with_hint(attempt.message, policy.hint)} Retry {used + 1} of {limit} (retry.infrastructure)"
        return Decision(True, f"{text} in {pause:.0f} s." if pause > 0 else f"{text}.", pause, counted)
    if policy.retry == "outOfMemory":
        return _after_out_of_memory(view, attempt)
    return Decision(False, attempt.message)


def budget_left(view: View, reason: str) -> bool:
    """Whether a run that failed for `reason` may go on with the limits as they are now."""
    allowed, run = view.parent.spec.retry, view.run
    match of_failure(reason).retry:
        case "infrastructure":
            return run.infrastructure_retries < allowed.infrastructure
        case "unforeseen":
            return run.infrastructure_retries < allowed.infrastructure and not _came_again(view)
        case "outOfMemory":
            return (
                view.stage == "train" and run.out_of_memory_retries < allowed.out_of_memory and _micro_batch(view) > 1
            )
        case _:
            return False


def _came_again(view: View) -> bool:
    """Whether a retry was spent without a step being made: what nobody foresaw is a bug then, not bad luck."""
    progress = view.status.progress
    stepped = view.stage == "train" and progress is not None and progress.step > 0
    return view.run.infrastructure_retries > 0 and not stepped


def _after_out_of_memory(view: View, attempt: Attempt) -> Decision:
    run, limit = view.run, view.parent.spec.retry.out_of_memory
    used, micro_batch = run.out_of_memory_retries, _micro_batch(view)
    if attempt.stage != "train":
        doing = {"prepare": "preparing", "export": "exporting"}[attempt.stage]
        return Decision(False, f"{attempt.message} while {doing}")
    if micro_batch <= 1:
        return Decision(False, f"{attempt.message}, and the micro batch is 1 already")
    if used >= limit:
        return Decision(False, _given_up(attempt.message, used, "outOfMemory", limit))
    batch = view.parent.spec.training.batch_size
    change = (
        f"micro batch {micro_batch} -> {micro_batch // 2} after {attempt.reason} in attempt {run.attempt}; "
        f"the effective batch stays {batch}"
    )
    changed = attempts.settled(view).model_copy(
        update={
            "out_of_memory_retries": used + 1,
            "micro_batch": micro_batch // 2,
            "changed": [*run.changed, change][-CHANGES_KEPT:],
        }
    )
    return Decision(True, f"{attempt.message}: {change} (retry {used + 1} of {limit})", 0.0, changed)


def _micro_batch(view: View) -> int:
    """The micro batch of the current attempt: as its pod said or was ordered; else as set, as estimated, or at most
    what one process gets of the whole batch.
    """
    training, estimate, resources = view.parent.spec.training, view.status.estimate, view.parent.spec.resources
    told = (view.current.micro_batch if view.current is not None else None) or view.run.micro_batch
    if told:
        return told
    share = max(1, training.batch_size // (max(1, resources.gpus) * resources.nodes))
    asked = training.micro_batch_size if isinstance(training.micro_batch_size, int) else None
    return min(asked or (estimate.largest_micro_batch if estimate else None) or share, share)


def _given_up(message: str, used: int, field: str, limit: int) -> str:
    return f"{message} Given up after {used} of {limit} retries (retry.{field}): raise it to go on."
