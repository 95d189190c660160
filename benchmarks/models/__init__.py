"""Whole models beside the peers' same models: `python -m benchmarks.models`."""
