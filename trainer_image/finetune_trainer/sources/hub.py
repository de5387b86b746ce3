"""The Hugging Face hub, or whatever HF_ENDPOINT names: its client's errors turned into failures that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from finetune_trainer import failures
from finetune_trainer.failures import RunFailure

Kind = Literal["base model", "dataset", "task"]

_FIELD = {
    "base model": "baseModel.huggingFace",
    "dataset": "dataset.{role}.huggingFace",
    "task": "evaluation.tasks: {role}",
}


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@contextmanager
def explained(kind: Kind, repo: str, revision: str, token: str | None, role: str = "train") -> Iterator[None]:
    """Turn what the hub's client raises into a RunFailure that names the field and the fix.

    `role`: train or evaluation of a dataset, or the name of a task.
    """
    try:
        yield
    except RunFailure:
        raise
    except Exception as error:
        failure = _failure(kind, repo, revision, token, role, error)
        if failure is None:
            raise
        raise failure from error


def _failure(
    kind: Kind, repo: str, revision: str, token: str | None, role: str, error: BaseException
) -> RunFailure | None:
    from huggingface_hub import errors

    where = _FIELD[kind].format(role=role)
    not_found = failures.BASE_MODEL_NOT_FOUND if kind == "base model" else failures.DATASET_NOT_FOUND
    chain = list(_causes(error))
    status = next((code for one in chain if (code := _status(one))), None)
    if kind == "task":
        return _of_task(where, repo, status, chain)
    if any(isinstance(one, errors.GatedRepoError) for one in chain):
        whose = "the token's account" if token else "an account with access, whose token is in tokenSecretRef"
        return RunFailure(
            failures.BASE_MODEL_GATED if kind == "base model" else failures.HUB_UNAUTHORIZED,
            f"{where}: {repo} is gated on {endpoint()}: accept its terms there with {whose}, then apply again",
        )
    if any(isinstance(one, errors.RevisionNotFoundError) for one in chain):
        return RunFailure(not_found, f"{where}.revision: {repo} has no revision {revision!r} on {endpoint()}")
    if status == 401 and token:
        return RunFailure(
            failures.HUB_UNAUTHORIZED,
            f"{where}: {endpoint()} refuses the token for {repo}: put a valid one that may read it into the Secret of "
            "tokenSecretRef",
        )
    if any(isinstance(one, errors.RepositoryNotFoundError) for one in chain) or status == 404:
        hint = "check its name" if token else "check its name; if it is private, set tokenSecretRef"
        return RunFailure(not_found, f"{where}.repo: {repo} is not on {endpoint()}, or may not be seen: {hint}")
    if status in (401, 403):
        return RunFailure(
            failures.HUB_UNAUTHORIZED,
            f"{where}: {endpoint()} answered {status} for {repo}: set tokenSecretRef to a token that may read it",
        )
    if status is not None or any(_is_connection(one) for one in chain):
        last = str(chain[-1]).splitlines()[0] if str(chain[-1]) else type(chain[-1]).__name__
        return RunFailure(failures.DOWNLOAD_FAILED, f"{where}: {endpoint()} cannot be reached for {repo} ({last})")
    return None


def _of_task(where: str, repo: str, status: int | None, chain: list[BaseException]) -> RunFailure | None:
    """A task's data has no field of its own, and no token."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    if any(isinstance(one, errors.GatedRepoError | DatasetNotFoundError) for one in chain):  # its name was found
        return RunFailure(
            failures.INVALID_TASK,
            f"{where}: {endpoint()} does not let everybody read its data {repo}, and tasks have no token; choose "
            "another task",
        )
    if status in (401, 403, 404):  # a hub does not tell those who have no token which of them it is
        return RunFailure(
            failures.INVALID_TASK,
            f"{where}: its data {repo} is not on {endpoint()}, or may not be seen; put a copy there",
        )
    if status is not None or any(_is_connection(one) for one in chain):
        last = str(chain[-1]).splitlines()[0] if str(chain[-1]) else type(chain[-1]).__name__
        return RunFailure(
            failures.DOWNLOAD_FAILED, f"{where}: {endpoint()} cannot be reached for its data {repo} ({last})"
        )
    return None


@contextmanager
def explained_push(repo: str) -> Iterator[None]:
    """The same for what is written to the hub."""
    try:
        yield
    except RunFailure:
        raise
    except Exception as error:
        chain = list(_causes(error))
        status = next((code for one in chain if (code := _status(one))), None)
        last = next((str(one).splitlines()[0] for one in reversed(chain) if str(one)), type(error).__name__)
        if status in (401, 403, 404):
            raise RunFailure(
                failures.HUB_UNAUTHORIZED,
                f"output.hub: {endpoint()} answered {status} for {repo} ({last}): put a token that may write to it "
                "into the Secret of tokenSecretRef",
            ) from error
        if status is not None or any(_is_connection(one) for one in chain):
            answered = f"answered {status}" if status is not None else "cannot be reached"
            raise RunFailure(
                failures.HUB_UNAVAILABLE, f"output.hub: {endpoint()} {answered} for {repo} ({last})"
            ) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return int(status) if isinstance(status, int) else None


def _is_connection(error: BaseException) -> bool:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError):
        return True
    # the hub's client has changed its HTTP library twice; all have had a TransportError
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
