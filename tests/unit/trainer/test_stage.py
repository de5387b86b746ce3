"""How a stage ends: the failure that an error becomes."""

import errno

import pytest
from safetensors import SafetensorError

from finetune_trainer.failures import RunFailure
from finetune_trainer.stage import failure_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "DiskFull"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "DiskFull"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "DiskFull"),
        (SafetensorError("Error while deserializing header: invalid header"), "InternalError"),
        (OSError(errno.EIO, "Input/output error"), "InternalError"),
        (RunFailure("NonFiniteLoss", "the loss became nan"), "NonFiniteLoss"),
    ],
    ids=str,
)
def test_an_error_becomes_the_failure_that_says_what_helps(error: Exception, reason: str) -> None:
    assert failure_of(error).reason == reason
