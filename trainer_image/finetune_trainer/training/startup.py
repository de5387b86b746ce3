"""The heavy imports, made once and without what training never uses: imports are most of the time to the first step."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from finetune_trainer.training.eager import no_compiler


def import_libraries(processes: int) -> None:
    """Import torch's companions, as far as a run of this many processes needs them."""
    for chatty in ("bitsandbytes", "transformers", "torch.distributed"):
        logging.getLogger(chatty).setLevel(logging.ERROR)  # a hub kernel that is not there, progress bars, redirects
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it
    with no_compiler(), bitsandbytes_if_loaded(), no_distributed() if processes == 1 else nullcontext():
        import peft  # noqa: F401
        import transformers
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def no_distributed() -> Iterator[None]:
    """Within it torch says that it was built without its distributed package, as some are; libraries remember it.

    Otherwise every model imports tensor parallelism and FSDP: DTensor and, for shapes that are symbols, sympy.
    """
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        from transformers.utils.import_utils import is_torch_distributed_available

        is_torch_distributed_available()
        yield
    finally:
        torch.distributed.is_available = is_available


@contextmanager
def bitsandbytes_if_loaded() -> Iterator[None]:
    """Within it PEFT finds bitsandbytes only where transformers has loaded quantized weights with it.

    PEFT would import it for every model, to see whether a layer is one of its.
    """
    hidden = "bitsandbytes" not in sys.modules
    if hidden:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        yield
    finally:
        if hidden:
            del sys.modules["bitsandbytes"]
            from peft.import_utils import is_bnb_4bit_available, is_bnb_available

            is_bnb_available.cache_clear()
            is_bnb_4bit_available.cache_clear()
