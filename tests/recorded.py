"""A module recorded by torch.export or torch.jit.trace."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

RECORDERS = ("export", "trace")


def recorded(recorder: str, module: nn.Module, example: tuple, dynamic: Sequence[Any]) -> Callable:
    """What the recorder makes of the module; `dynamic`: the dynamic dimensions of each input."""
    if recorder == "export":
        return torch.export.export(module, example, dynamic_shapes=tuple(dynamic)).module()
    return torch.jit.trace(module, example, check_trace=False)
