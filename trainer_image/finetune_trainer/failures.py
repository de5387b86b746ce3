"""Why a run can fail: one exception, one closed list of reasons.

The operator maps each reason to a retry policy and a hint (`finetune_operator.reasons`); a unit test holds the two
lists together.
"""

import errno

INVALID_DATASET = "InvalidDataset"
DATASET_NOT_FOUND = "DatasetNotFound"
INVALID_TASK = "InvalidTask"
BASE_MODEL_NOT_FOUND = "BaseModelNotFound"
BASE_MODEL_GATED = "BaseModelGated"
HUB_UNAUTHORIZED = "HubUnauthorized"
HUB_UNAVAILABLE = "HubUnavailable"
STORAGE_UNAUTHORIZED = "StorageUnauthorized"
STORAGE_UNAVAILABLE = "StorageUnavailable"
UPLOAD_FAILED = "UploadFailed"
DOWNLOAD_FAILED = "DownloadFailed"
DIGEST_MISMATCH = "DigestMismatch"
UNSUPPORTED_COMBINATION = "UnsupportedCombination"
DOES_NOT_FIT = "DoesNotFit"
GPU_NOT_VISIBLE = "GPUNotVisible"
CUDA_OUT_OF_MEMORY = "CUDAOutOfMemory"
WORLD_SIZE_MISMATCH = "WorldSizeMismatch"
NON_FINITE_LOSS = "NonFiniteLoss"
PEER_LOST = "PeerLost"
DISK_FULL = "DiskFull"
INTERNAL_ERROR = "InternalError"

REASONS = frozenset(value for name, value in dict(globals()).items() if name.isupper() and isinstance(value, str))


class RunFailure(Exception):
    """A run cannot go on: `reason` is one of REASONS, `message` names the field, file or row and says what to do."""

    def __init__(self, reason: str, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown failure reason {reason!r}")
        super().__init__(message)
        self.reason = reason
        self.message = message


def out_of_space(error: Exception) -> bool:
    """Whether a disk was full; safetensors, written in Rust, says so in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)
