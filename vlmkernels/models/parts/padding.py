"""Rows of text one after the other, without their padding, for towers of which it changes nothing."""

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
    bounds: Tensor  # [B + 1] int64: row b holds bounds[b] to bounds[b + 1]


def can_drop(tokens: Tensor) -> bool:
    """Whether padding can be dropped: how much there is must be known, which on accelerators, in compiled and
    in traced code it is not, and attention must cost what is seen, which without the C++ kernels it does not.
    """
    return tokens.device.type == "cpu" and not is_traced() and _native.extension is not None


def drop(
    tokens: Tensor,  # [B, L]
    lengths: Tensor,  # [B], of each row without its padding
) -> Texts:
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    inside = position < lengths[:, None]
    return Texts(tokens[inside][None], position[inside][None], F.pad(lengths.cumsum(0), (1, 0)))
