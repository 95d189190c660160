"""Choosing tokens one by one, for any model with a cache: see `parts/generation.py`."""

from vlmkernels.models.parts.generation import Decoding, StepOutput, filter_logits, generate

__all__ = ["Decoding", "StepOutput", "filter_logits", "generate"]
