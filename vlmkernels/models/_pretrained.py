"""Reading and writing models: see `parts/pretrained.py`."""

from vlmkernels.models.parts.pretrained import (
    Pretrained,
    config_from_dict,
    naming,
    read_config,
    save_tensors,
)

__all__ = ["Pretrained", "config_from_dict", "naming", "read_config", "save_tensors"]
