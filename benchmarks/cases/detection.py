"""Suppression of boxes, and their features on the levels of a pyramid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vlmkernels
from benchmarks import peers
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name
from vlmkernels import reference
from vlmkernels.reference.roi_align import roi_align_bwd, roi_align_fwd

THRESHOLD = 0.7
LEVELS = 4  # of strides 4, 8, 16, 32
OBJECTS = 400


def _compiled_operators(name: str) -> Any:
    """An operator of torchvision's extension."""
    if not peers.load("torchvision.extension")._has_ops():
        raise ImportError("torchvision's extension does not load beside this torch")
    return getattr(torch.ops.torchvision, name)


def _proposals(device: str, dtype: torch.dtype, n: int) -> dict[str, Tensor]:
    """Boxes of a region proposal network: many around each object, of which about half stay at 0.7."""
    at = 1000 * torch.rand(OBJECTS, 2)[torch.randint(OBJECTS, (n,))] + 8 * torch.randn(n, 2)
    boxes = torch.cat([at, at + 30 + 90 * torch.rand(n, 2)], 1)
    return {"boxes": boxes.to(device, dtype), "scores": torch.rand(n).to(device, dtype)}


def _kept(boxes: Tensor, scores: Tensor) -> Tensor:
    return vlmkernels.nms(boxes, scores, THRESHOLD)


def _by_matrix(boxes: Tensor, scores: Tensor) -> Tensor:
    """All pairs; a box stays if none that stays and is better overlaps it, until nothing changes."""
    order = (-scores).argsort(stable=True)
    boxes = boxes[order].float()
    sides = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
    common = sides.clamp_min(0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    hits = (common / (areas[:, None] + areas - common) > THRESHOLD).triu(1)
    stays = torch.ones_like(order, dtype=torch.bool)
    while True:
        now = ~(hits & stays[:, None]).any(0)
        if torch.equal(now, stays):
            return order[stays]
        stays = now


def _by_torchvision() -> Callable[..., Tensor]:
    operator = _compiled_operators("nms")
    return lambda boxes, scores: operator(boxes.float(), scores.float(), THRESHOLD)


def nms(quick: bool, device: str) -> list[Case]:
    """As many comparisons as the boxes that stay leave over."""
    cases = []
    for dtype in (F32, BF16):
        for n in (1000, 10_000):
            matrix = Baseline("a matrix of IoU in PyTorch", lambda: _by_matrix)
            cases.append(
                Case(
                    op="nms",
                    name=f"N={n} {type_name(dtype)}",
                    dtype=dtype,
                    sizes=cut(quick, n=n),
                    make_inputs=_proposals,
                    ours=_kept,
                    baselines=timed(
                        quick,
                        Baseline(
                            "a loop in PyTorch", lambda: partial(reference.nms, iou_threshold=THRESHOLD)
                        ),
                        matrix,
                        Baseline(f"torch.compile of {matrix.name}", matrix.make, True),
                        Baseline("torchvision.ops.nms", _by_torchvision),
                    ),
                    flops=0,
                    min_flops=0,
                    bytes=float(n * (5 * dtype.itemsize + 8)),
                    backward=False,
                    memory=True,
                    headline=n == 10_000,
                )
            )
    return cases


def _pyramid(
    device: str, dtype: torch.dtype, count: int, channels: int, height: int, width: int
) -> dict[str, Tensor]:
    """Levels, and as many boxes on each, which have 14 to 28 of its pixels a side."""
    tensors = {}
    for level in range(LEVELS):
        h, w = height >> level, width >> level
        features = torch.randn(1, channels, h, w).to(device, dtype)
        sides = (14 + 14 * torch.rand(count // LEVELS, 2)).clamp_max(min(h, w) - 1)
        at = torch.rand(count // LEVELS, 2) * (torch.tensor([w, h]) - sides)
        boxes = torch.cat([torch.zeros(len(at), 1), (4 << level) * torch.cat([at, at + sides], 1)], 1)
        tensors |= {f"features{level}": features.requires_grad_(), f"boxes{level}": boxes.to(device)}
    return tensors


def _each_level(pool: Callable[..., Tensor], **tensors: Tensor) -> Tensor:
    levels = ((tensors[f"features{i}"], tensors[f"boxes{i}"], 1 / (4 << i)) for i in range(LEVELS))
    return torch.cat([pool(*level) for level in levels])


def _ours(ratio: int, features: Tensor, boxes: Tensor, scale: float) -> Tensor:
    return vlmkernels.roi_align(features, boxes, 7, spatial_scale=scale, sampling_ratio=ratio)


class _Loop(torch.autograd.Function):
    """The definition with its gradient in closed form: autograd's writes all features once for each box."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, boxes: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(boxes)
        ctx.sizes, ctx.options = (len(features), *features.shape[2:]), options
        return roi_align_fwd(features, boxes, 7, 7, *options)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (boxes,) = ctx.saved_tensors
        return roi_align_bwd(dout, boxes, *ctx.sizes, *ctx.options, (True,)), None, None, None, None


def _plain(ratio: int, features: Tensor, boxes: Tensor, scale: float) -> Tensor:
    return _Loop.apply(features, boxes, scale, ratio, True)


def _torchvisions_python() -> Callable[..., Tensor]:
    pool = peers.load("torchvision.ops.roi_align")._roi_align.__wrapped__
    return partial(_each_level, lambda features, boxes, scale: pool(features, boxes, scale, 7, 7, 2, True))


def _torchvisions_operator(ratio: int) -> Callable[..., Tensor]:
    operator = _compiled_operators("roi_align")

    def pool(features: Tensor, boxes: Tensor, scale: float) -> Tensor:
        return operator(features.float(), boxes, scale, 7, 7, ratio, True).to(features.dtype)

    return partial(_each_level, pool)


def roi_align(quick: bool, device: str) -> list[Case]:
    """Bound by reading a pyramid and writing its gradient."""
    cases = []
    for dtype in (F32, BF16):
        for ratio in (2, 0):
            sizes = cut(quick, count=1000, channels=8 if quick else 256, height=200, width=304)
            pixels = sum((sizes["height"] >> i) * (sizes["width"] >> i) for i in range(LEVELS))
            moved = sizes["channels"] * (pixels + sizes["count"] * 49)
            found = [
                Baseline(
                    "a loop over the boxes in PyTorch", partial(partial, _each_level, partial(_plain, ratio))
                )
            ]
            if ratio:  # without, it takes as many samples of a bin as the picture has pixels
                python = Baseline("torchvision's Python form", _torchvisions_python)
                found += [python, Baseline(f"torch.compile of {python.name}", python.make, True)]
            found.append(Baseline("torchvision.ops.roi_align", partial(_torchvisions_operator, ratio)))
            samples = "2 x 2 samples" if ratio else "adaptive"
            cases.append(
                Case(
                    op="roi_align",
                    name=f"4 levels, 1000 boxes, 7 x 7, 256 channels, {samples} {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=_pyramid,
                    ours=partial(_each_level, partial(_ours, ratio)),
                    baselines=timed(quick, *found),
                    flops=0,
                    min_flops=0,
                    bytes=float(2 * moved * dtype.itemsize),
                    memory=ratio == 2,
                    headline=ratio == 2,
                    out_shape=("count", "channels", 7, 7),
                )
            )
    return cases


CASES = (nms, roi_align)
