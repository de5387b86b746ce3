"""Benchmarks that anyone can run: each prints its figures and fails above its bound."""
