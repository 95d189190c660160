"""Reading and writing models: see `parts/pretrained.py`."""

from vlmkernels.models.parts.pretrained import config_from_dict, naming, read_config, save_tensors

__all__ = ["config_from_dict", "naming", "read_config", "save_tensors"]
