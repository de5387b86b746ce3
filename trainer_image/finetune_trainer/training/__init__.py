"""The loop, and what it stands on: numbers, layout, memory of the optimizer, checkpoints, processes."""
