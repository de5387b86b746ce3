"""The texts on which an adapter must differ from its base model: merging and serving ask the same."""

from collections.abc import Sequence

DEFAULT_PROMPTS = (
    "Hello! How can I help you today?",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "User: What is your name?\nAssistant: My name is",
    "def add(a, b):\n    return a + b\n",
)
MAX_PROMPTS = 8


def prompts_for(asked: Sequence[str], recorded: Sequence[str]) -> tuple[str, ...]:
    """The spec's prompts; else those that training recorded in the adapter's manifest, and the fixed ones."""
    return tuple(asked) if asked else (*recorded, *DEFAULT_PROMPTS)[:MAX_PROMPTS]
