"""out = Y f X^T / n for each channel f [H, W] of a picture and each box in it.

Y [h, H] and X [w, W] average linear interpolations. Along an axis of L pixels, with the corners of the box
times the scale, less 1/2 where it is `aligned` (pixel centres are whole numbers then), as start and end, bin
p of h has the size b = (end - start) / h and s samples, the ratio or ceil(b) of them, at

    y = start + p b + (i + 1/2) b / s,    i = 0 ... s - 1

    Y[p, r] = sum over the samples with -1 <= y <= L of max(0, 1 - |min(max(y, 0), L - 1) - r|)

n = max(s_y s_x, 1). A box that is not `aligned` has sides of at least 1. Corners count as at most `FAR` from
the origin, and a box with a NaN has no samples.

The op is linear in f, and the box has no gradient: with dout [h, w] of each channel

    df = sum over the boxes of the picture, in their order, of Y^T dout X / n
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FAR = 2.0**20  # pixels


def roi_align(
    features: Tensor,  # [B, C, H, W]
    boxes: Tensor | Sequence[Tensor],  # [K, 5], or for each picture [k, 4]
    output_size: int | tuple[int, int],
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:  # [K, C, h, w]
    """The definition, differentiable by autograd with respect to the features."""
    size = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    h, w = (+n for n in size)  # True counts as 1, as for the op, but torch makes no tensors of size True
    rows = boxes if isinstance(boxes, Tensor) else with_pictures(features, boxes)
    return roi_align_fwd(features, rows, h, w, spatial_scale, sampling_ratio, aligned)


def with_pictures(features: Tensor, boxes: Sequence[Tensor]) -> Tensor:  # [K, 5]
    """The boxes of all pictures, the index of its picture in front of each, float32 or higher."""
    if not boxes:
        return features.new_empty(0, 5)
    wide = [box.to(torch.promote_types(box.dtype, torch.float32)) for box in boxes]
    return torch.cat([torch.cat([box.new_full((len(box), 1), i), box], 1) for i, box in enumerate(wide)])


class _Part(NamedTuple):
    """Where a box has its samples, and their weights."""

    picture: int
    rows: slice
    cols: slice
    down: Tensor  # [h, rows], divided by n
    across: Tensor  # [w, cols]


def roi_align_fwd(
    features: Tensor,
    boxes: Tensor,
    out_height: int,
    out_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The raw op."""
    check("roi_align", features, boxes, (out_height, out_width), spatial_scale, sampling_ratio)
    batch, channels, *sizes = features.shape
    work = torch.promote_types(features.dtype, torch.float32)
    options = (out_height, out_width), spatial_scale, sampling_ratio, aligned
    out = [
        _product(
            part.down, features[part.picture, :, part.rows, part.cols].to(work).contiguous(), part.across.T
        )
        for part in _parts("roi_align", boxes.to(work), batch, sizes, *options)
    ]
    if not out:
        return features.new_empty(0, channels, out_height, out_width)
    return torch.stack(out).to(features.dtype)


def roi_align_bwd(
    dout: Tensor,  # [K, C, h, w]
    boxes: Tensor,  # [K, 5]
    batch: int,
    height: int,
    width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    needs: Sequence[bool],
) -> Tensor:  # [B, C, H, W]
    """dfeatures, of size 0 if it is not needed."""
    check_backward("roi_align_bwd", dout, boxes, batch, height, width, spatial_scale, sampling_ratio)
    if not needs[0]:
        return dout.new_empty(0)
    work = torch.promote_types(dout.dtype, torch.float32)
    dfeatures = dout.new_zeros((batch, dout.shape[1], height, width), dtype=work)
    bins = (dout.shape[2], dout.shape[3])
    options = (spatial_scale, sampling_ratio, aligned)
    parts = _parts("roi_align_bwd", boxes.to(work), batch, (height, width), bins, *options)
    for part, grad in zip(parts, dout.to(work), strict=True):
        dfeatures[part.picture, :, part.rows, part.cols] += _product(part.down.T, grad, part.across)
    return dfeatures.to(dout.dtype)


def _product(down: Tensor, x: Tensor, across: Tensor) -> Tensor:
    """down @ x @ across, whose weights are not negative: a weight of 0 leaves out what is no number."""
    if x.isfinite().all():
        return down @ x @ across
    out = down @ x.where(x.isfinite(), 0) @ across
    for value, there in ((math.inf, x == math.inf), (-math.inf, x == -math.inf), (math.nan, x.isnan())):
        reached = (down != 0).to(x) @ there.to(x) @ (across != 0).to(x) > 0
        out = out + torch.zeros_like(out).masked_fill(reached, value)
    return out


def _parts(
    op: str,
    boxes: Tensor,
    batch: int,
    sizes: Sequence[int],
    bins: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Iterator[_Part]:
    """Of each box."""
    check_pictures(op, boxes[:, 0], batch)
    corners = (boxes[:, 1:] * spatial_scale).clamp(-FAR, FAR) - (0.5 if aligned else 0.0)
    for picture, (left, top, right, bottom) in zip(boxes[:, 0].long().tolist(), corners, strict=True):
        down, across = (
            _Axis(start, end, of, sampling_ratio, aligned, length)
            for start, end, of, length in zip((top, left), (bottom, right), bins, sizes, strict=True)
        )
        count = max(down.samples * across.samples, 1)
        (rows, y), (cols, x) = down.weights(), across.weights()
        yield _Part(picture, rows, cols, y / count, x)


class _Axis:
    """The bins of a box along one axis."""

    def __init__(
        self, start: Tensor, end: Tensor, bins: int, sampling_ratio: int, aligned: bool, length: int
    ):
        extent = end - start if aligned else (end - start).clamp_min(1)
        self.start, self.size, self.bins, self.length = start, extent / bins, bins, length
        adaptive = math.ceil(self.size) if self.size > 0 else 0  # 0 for NaN
        self.samples = sampling_ratio or adaptive

    def weights(self) -> tuple[slice, Tensor]:
        """The places with samples, from the first to the last, and the weight of each in each bin."""
        start, size, samples = self.start, self.size, self.samples
        if samples == 0 or self.length == 0:
            return slice(0, 0), start.new_zeros(self.bins, 0)
        bins, steps = (torch.arange(n, dtype=start.dtype, device=start.device) for n in (self.bins, samples))
        at = (start + bins[:, None] * size) + (steps + 0.5) * size / samples  # [bins, samples]
        inside = (at >= -1) & (at <= self.length)
        at = at.where(inside, 0).clamp(0, self.length - 1)
        low = at.long()
        part, high = at - low, (low + 1).clamp_max(self.length - 1)
        weights = start.new_zeros(self.bins, self.length)
        weights.scatter_add_(1, low, (1 - part).where(inside, 0))
        weights.scatter_add_(1, high, part.where(inside, 0))
        used = weights.any(0).nonzero().flatten().tolist()
        places = slice(used[0], used[-1] + 1) if used else slice(0, 0)
        return places, weights[:, places]


def check_pictures(op: str, picture: Tensor, batch: int) -> None:
    """A device assertion where reading them would synchronise."""
    valid = ((picture >= 0) & (picture < batch) & (picture == picture.floor())).all()
    if picture.is_cuda or picture.is_meta:
        torch._assert_async(valid, f"{op}: boxes[:, 0] must be indices of pictures")
    elif not valid:
        raise IndexError(
            f"{op}: boxes[:, 0] must be indices of pictures, in [0, B = {batch}), got {picture.tolist()[:8]}"
        )


MOST_BINS, MOST_SAMPLES, MOST_PIXELS = 2**12, 2**10, int(FAR)


def check(op, features, boxes, output_size, spatial_scale, sampling_ratio) -> None:
    faults = shape_faults(features, boxes)
    faults += option_faults(output_size, features.shape[2:], spatial_scale, sampling_ratio)
    if faults:
        raise ValueError(f"{op}: " + "; ".join(faults))


def check_backward(op, dout, boxes, batch, height, width, spatial_scale, sampling_ratio) -> None:
    faults = box_faults(boxes)
    if dout.dim() != 4 or dout.shape[:1] != boxes.shape[:1]:
        wanted = f"[K, C, h, w], one for each of boxes {tuple(boxes.shape)}"
        faults.append(f"dout must be {wanted}, got {tuple(dout.shape)}")
    if min(batch, height, width) < 0:
        faults.append(f"batch, height and width must be at least 0, got {batch}, {height} and {width}")
    faults += option_faults(dout.shape[2:], (height, width), spatial_scale, sampling_ratio)
    if faults:
        raise ValueError(f"{op}: " + "; ".join(faults))


def box_faults(boxes: Tensor) -> list[str]:
    if boxes.dim() == 2 and boxes.shape[1] == 5:
        return []
    return [f"boxes must be [K, 5] or a list of [k, 4], got {tuple(boxes.shape)}"]


def shape_faults(features: Tensor, boxes: Tensor | Sequence[Tensor]) -> list[str]:
    faults = [] if features.dim() == 4 else [f"features must be [B, C, H, W], got {tuple(features.shape)}"]
    if isinstance(boxes, Tensor):
        return faults + box_faults(boxes)
    pictures = features.shape[0] if features.dim() else 0
    if len(boxes) != pictures or any(box.dim() != 2 or box.shape[1] != 4 for box in boxes):
        got = [tuple(box.shape) for box in boxes]
        faults.append(f"boxes must be [k, 4] for each of {pictures} pictures, got {got}")
    return faults


def option_faults(
    output_size: Sequence[int], sizes: Sequence[int], spatial_scale: float, sampling_ratio: int
) -> list[str]:
    faults = []
    if len(output_size) != 2 or not all(1 <= size <= MOST_BINS for size in output_size):
        faults.append(f"output_size must be two numbers from 1 to {MOST_BINS}, got {tuple(output_size)}")
    if any(size > MOST_PIXELS for size in sizes):
        faults.append(f"features must have at most {MOST_PIXELS} rows and columns, got {tuple(sizes)}")
    if not 0 < spatial_scale < math.inf:
        faults.append(f"spatial_scale must be positive and finite, got {spatial_scale}")
    if not 0 <= sampling_ratio <= MOST_SAMPLES:
        faults.append(f"sampling_ratio must be from 0 (adaptive) to {MOST_SAMPLES}, got {sampling_ratio}")
    return faults
