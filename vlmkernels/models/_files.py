"""The files of models: see `parts/weight_files.py`."""

from vlmkernels.models.parts.weight_files import check_content, read_json

__all__ = ["check_content", "read_json"]
