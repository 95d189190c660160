"""Greedy non-maximum suppression: indices of the boxes that no better one of their group overlaps."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel, unknown_size
from vlmkernels.reference.nms import nms_faults, nms_fwd


@arguments.public
def nms(
    boxes: Tensor,  # [N, 4]
    scores: Tensor,  # [N]
    iou_threshold: float,
    *,
    groups: Tensor | None = None,  # [N] int
) -> Tensor:  # [kept] int64
    """Non-maximum suppression: the best box stays, what overlaps it too much goes, and so on with the rest.

    The same decisions as torchvision's: ``nms`` without groups, and with classes as groups its
    ``batched_nms``, where that does not shift the boxes apart, which rounds them.

    Args:
        boxes: ``[N, 4]``, corners x1, y1, x2, y2, in float32, float64, bfloat16 or float16.
        scores: ``[N]`` of any of these.
        iou_threshold: in [0, 1]. A box goes if its IoU with a box of its group that stays is above it. IoU is
            computed in float32 (float64 for float64 boxes).
        groups: ``[N]`` int32 or int64, of any values: only boxes of one group suppress each other.

    Returns:
        int64 indices of the boxes that stay, by falling score; of equal scores the lower index is first and
        suppresses the others, and NaN is below every number. No gradient. Boxes without an area, or with a
        NaN, suppress nothing and are not suppressed, but for one without an area within one that has.

    Raises:
        ValueError: naming every invalid argument.
    """
    faults = nms_faults(boxes, scores, groups, iou_threshold)
    faults += arguments.dtype_faults({"boxes": boxes, "scores": scores})
    faults += arguments.device_faults({"boxes": boxes, "scores": scores, "groups": groups})
    if faults:
        raise ValueError("nms: " + "; ".join(faults))
    return _op(boxes, scores, groups, iou_threshold)


def _fake(boxes, scores, groups, iou_threshold):
    return boxes.new_empty(unknown_size(), dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output)


_op = define(
    "nms(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold) -> Tensor",
    reference=nms_fwd,
    fake=_fake,
    flops=lambda *_, **__: 0,
    setup_context=_setup_context,
)

if TRITON:
    from vlmkernels.triton import nms as _triton

    kernel("nms", "CUDA", _triton.nms, "Triton")
