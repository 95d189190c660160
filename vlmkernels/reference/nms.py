"""Greedy suppression: the best box that is left stays, and those of its group that overlap it go.

For boxes a and b with corners (x1, y1, x2, y2), areas A = (x2 - x1) (y2 - y1) and

    I = max(min(x2_a, x2_b) - max(x1_a, x1_b), 0) max(min(y2_a, y2_b) - max(y1_a, y1_b), 0)

IoU = I / (A_a + A_b - I), each operation rounded to the precision of the boxes, float32 or higher, and
compared with the threshold exactly. It is NaN, above no threshold, for two boxes without an area and where a
corner is.
"""

import torch
from torch import Tensor


def nms(
    boxes: Tensor,  # [N, 4]
    scores: Tensor,  # [N]
    iou_threshold: float,
    *,
    groups: Tensor | None = None,  # [N]
) -> Tensor:  # [kept] int64
    """The definition."""
    return nms_fwd(boxes, scores, groups, iou_threshold)


def overlaps(
    box: Tensor,  # [4]
    boxes: Tensor,  # [N, 4]
) -> Tensor:  # [N]
    """IoU of one box with others."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp_min(0)
    common = sides[:, 0] * sides[:, 1]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return common / ((box[2] - box[0]) * (box[3] - box[1]) + areas - common)


def order_of(scores: Tensor) -> Tensor:
    """Indices by falling score, ties by the lower index, NaN last."""
    return (-scores).argsort(stable=True)


def nms_fwd(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
) -> Tensor:
    """The raw op."""
    faults = nms_faults(boxes, scores, groups, iou_threshold)
    if faults:
        raise ValueError("nms: " + "; ".join(faults))
    left, kept = order_of(scores), []
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        goes = overlaps(boxes[best], boxes[left]).double() > iou_threshold
        left = left[~goes if groups is None else ~(goes & (groups[left] == groups[best]))]
    return torch.stack(kept) if kept else left


def nms_faults(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> list[str]:
    faults = []
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        faults.append(f"boxes must be [N, 4], got {tuple(boxes.shape)}")
    if scores.shape != boxes.shape[:1]:
        faults.append(
            f"scores must be [N], one for each of boxes {tuple(boxes.shape)}, got {tuple(scores.shape)}"
        )
    if groups is not None and (
        groups.shape != boxes.shape[:1] or groups.dtype not in (torch.int32, torch.int64)
    ):
        wanted = f"int32 or int64 [N], one for each of boxes {tuple(boxes.shape)}"
        faults.append(f"groups must be {wanted}, got {groups.dtype} {tuple(groups.shape)}")
    if not 0 <= iou_threshold <= 1:
        faults.append(f"iou_threshold must be in [0, 1], got {iou_threshold}")
    return faults
