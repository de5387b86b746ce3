"""Frees an adapter's slot in vLLM when it is unloaded.

vLLM's unload endpoint forgets the name and leaves the weights in their slot until another adapter needs it. On a CPU
that is worse than waste: vLLM 0.32 computes requests for the base model, in a batch with others, with whatever is in
the last slot (index -1 in vllm/lora/ops/torch_ops/lora_ops.py). The operator keeps that slot free (`max-loras` is one
more than can be loaded); this keeps the others from running over into it. Standard library only, as the middleware.
"""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger("finetune_serving")


def adapter_id(app: Any, name: str) -> int | None:
    """vLLM's number of a loaded adapter; None when it is not loaded, or this vLLM keeps its state elsewhere."""
    models = getattr(getattr(app, "state", None), "openai_serving_models", None)
    request = getattr(models, "lora_requests", {}).get(name)
    return getattr(request, "lora_int_id", None)


async def free(app: Any, number: int) -> None:
    """Removes the weights from the engine. A vLLM that cannot is no reason to fail: the slot is reused later."""
    remove = getattr(getattr(getattr(app, "state", None), "engine_client", None), "remove_lora", None)
    if remove is None:
        log.warning("this vLLM cannot free adapter %d at once; its slot is reused when another needs it", number)
        return
    try:
        await remove(number)
    except Exception:  # whatever vLLM raises, the adapter is unloaded for clients, which is what was asked
        log.exception("adapter %d: its slot was not freed", number)
