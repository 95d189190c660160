"""Valid arguments of the raw ops of detection."""

import torch
from torch import Tensor

from .draw import Draw


def corners(draw: Draw, count: int) -> Tensor:
    """Boxes of all kinds: small, large, far from the picture, empty, with corners in the wrong order."""
    at = 20 * torch.randn(count, 2) + draw.choice((0, 10, 1000))
    return torch.cat([at, at + draw.choice((0.5, 10, 1e6)) * torch.randn(count, 2).abs()], 1)


def nms(draw: Draw) -> list:
    n = draw.size()
    groups = draw.maybe(draw.ids(n, 3, draw.choice((torch.int32, torch.int64))))
    return [corners(draw, n).to(draw.dtype()), draw.floats(n), groups, draw.choice((0.0, 0.5, 0.7, 1.0))]


def pictures(draw: Draw, count: int, batch: int) -> Tensor:
    return torch.cat([draw.ids(count, batch).float()[:, None], corners(draw, count)], 1).to(draw.dtype())


def options(draw: Draw) -> list:
    return [draw.choice((1.0, 0.25, 0.0625)), draw.choice((0, 0, 1, 2, 5)), draw.flag()]


def roi_align(draw: Draw) -> list:
    batch, count = draw.small(), draw.size()
    features = draw.floats(batch, draw.small(), draw.size(), draw.size())
    return [features, pictures(draw, count, batch), draw.small(), draw.choice((1, 3, 7)), *options(draw)]


def roi_align_bwd(draw: Draw) -> list:
    features, boxes, h, w, *chosen = roi_align(draw)
    batch, channels, height, width = features.shape
    dout = draw.floats(len(boxes), channels, h, w)
    return [dout, boxes, batch, height, width, *chosen, draw.needs(1)]


ARGUMENTS = {make.__name__: make for make in (nms, roi_align, roi_align_bwd)}
