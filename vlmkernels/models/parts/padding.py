"""Rows of text packed without their padding, for towers whose results do not depend on it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels import _native
from vlmkernels._modules import is_traced


class Texts(NamedTuple):
    """The N tokens of B rows in one row."""

    tokens: Tensor  # [1, N]
    positions: Tensor  # [1, N], of each token in its own row
    bounds: Tensor  # [B + 1] int64: row b is bounds[b] to bounds[b + 1]


def can_drop(tokens: Tensor) -> bool:
    """Whether padding can be dropped: its amount must be known without waiting, which excludes accelerators
    and compiled or traced code, and attention must skip what is masked, which needs the C++ kernels.
    """
    return tokens.device.type == "cpu" and not is_traced() and _native.extension is not None


def drop(
    tokens: Tensor,  # [B, L]
    lengths: Tensor,  # [B], of each row without its padding
) -> Texts:
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    inside = position < lengths[:, None]
    return Texts(tokens[inside][None], position[inside][None], F.pad(lengths.cumsum(0), (1, 0)))
