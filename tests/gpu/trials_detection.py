"""Trials of nms and roi_align."""

import torch

from vlmkernels.reference.nms import nms_fwd
from vlmkernels.reference.roi_align import roi_align_bwd, roi_align_fwd
from vlmkernels.triton import nms, roi_align

from .trials import judge, widened


class Suppression:
    """n boxes around some objects, and at the end two without an area and one with a NaN."""

    def __init__(self, n, dtype, *, threshold=0.4, groups=None):
        at = 100 * torch.rand(5, 2)[torch.arange(n) % 5] + 8 * torch.randn(n, 2)
        boxes = torch.cat([at, at + 10 + 30 * torch.rand(n, 2)], 1)
        if n > 3:
            boxes[-2:, 2:], boxes[-3, 1] = boxes[-2:, :2], float("nan")
        self.boxes, self.scores = boxes.to(dtype), torch.randn(n).to(dtype)
        self.groups = None if groups is None else torch.randint(groups, (n,))
        self.threshold = threshold

    def launch(self):
        return (nms.nms(self.boxes, self.scores, self.groups, self.threshold),)

    def judge(self, got):
        assert torch.equal(got[0], nms_fwd(self.boxes, self.scores, self.groups, self.threshold)), "kept"


class Pooling:
    """roi_align and its backward; of the boxes one is far away, one empty, and two reach over the edges."""

    def __init__(
        self, batch, channels, height, width, boxes, dtype, *, size=(2, 3), scale=1.0, ratio=0, aligned=True
    ):  # fmt: skip
        corners = torch.rand(boxes, 2) * torch.tensor([width, height]) / scale
        corners = torch.cat([corners, corners + torch.rand(boxes, 2) * 8 / scale], 1)
        special = [[-50, -50, -40, -40], [3, 3, 3, 3], [-4.3, -5.2, width + 5.1, 4.4], [2, 1, 5, height + 6]]
        special += [[float("nan"), 0, 4, 4], [-1e6, 0, 2e6, height], [4, 4, 1, 1]]
        corners[: len(special)] = torch.tensor(special[:boxes]) / scale
        picture = torch.randint(batch, (boxes, 1))
        self.boxes = torch.cat([picture, corners], 1)
        self.features = torch.randn(batch, channels, height, width).to(dtype)
        self.dout = torch.randn(boxes, channels, *size).to(dtype)
        self.size, self.options = size, (scale, ratio, aligned)

    def launch(self):
        pictures = len(self.features), *self.features.shape[2:]
        out = roi_align.roi_align(self.features, self.boxes, *self.size, *self.options)
        return out, roi_align.roi_align_bwd(self.dout, self.boxes, *pictures, *self.options, [True])

    def exact(self, work):
        features, dout = widened([self.features, self.dout], work)
        pictures = len(features), *features.shape[2:]
        out = roi_align_fwd(features, self.boxes, *self.size, *self.options)
        return out, roi_align_bwd(dout, self.boxes, *pictures, *self.options, [True])

    def judge(self, got):
        low = [x.to(self.features.dtype) for x in self.exact(torch.float32)]
        judge(("out", "dfeatures"), got, low, self.exact(torch.float64))
