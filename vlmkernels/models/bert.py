"""ALIGN's text tower: see `parts/bert.py`."""

from vlmkernels.models.parts.bert import Bert

__all__ = ["Bert"]
