"""The heavy imports, made once and without what training never uses: imports are most of the time to the first step."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def no_compiler() -> Iterator[None]:
    """Within it `torch.compile` is the identity.

    bitsandbytes decorates its CPU fallbacks with it, and so imports the whole of inductor (sympy, networkx, ...): half of
    the start-up. Eager fallbacks also give the same bits on every node, and need no C++ compiler in the image.
    """
    compiler = torch.compile

    def identity(function: Callable[..., Any] | None = None, **options: object) -> Callable[..., Any]:
        return function if function is not None else lambda decorated: decorated

    torch.compile = identity  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def import_libraries() -> None:
    """Import torch's companions in the order that costs least."""
    for chatty in ("bitsandbytes", "transformers", "torch.distributed"):
        logging.getLogger(chatty).setLevel(logging.ERROR)  # a hub kernel that is not there, progress bars, redirects
    with no_compiler():
        import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers

    transformers.utils.logging.disable_progress_bar()
