"""Whole models against the peers' implementations of the same models: `python -m benchmarks.models`."""
