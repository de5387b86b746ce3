"""Experiment trackers: MLflow and Weights & Biases follow a run, each in a thread of its own that training never waits for."""
