"""The cases of nms and roi_align."""

from collections.abc import Callable, Iterator

from vlmkernels.triton import nms, roi_align

from .trials import DTYPES
from .trials_detection import Pooling, Suppression

FP32, BF16, FP16 = DTYPES


def boxes(each: Callable[..., Iterator]) -> Iterator:
    """The cases, made by `each` of cases.py."""
    op, few = "nms", {(nms, "ROWS"): 32}

    def suppression(n, **options):
        return lambda t: Suppression(n, t, **options)

    yield from each(op, "ragged", suppression(77), quick=(FP32,))
    yield from each(op, "groups", suppression(70, groups=3), quick=(BF16,), settings=few)
    yield from each(op, "whole words", suppression(64, threshold=0.7), quick=(FP16,))
    yield from each(op, "all overlap", suppression(100, threshold=0.0), settings=few)
    yield from each(op, "none goes", suppression(70, threshold=1.0))
    yield from each(op, "one", suppression(1))

    op, few = "roi_align", {(roi_align, "BINS"): 16, (roi_align, "SIDE"): 4, (roi_align, "NEIGHBOURS"): 4}

    def pooling(*sizes, **options):
        return lambda t: Pooling(*sizes, t, **options)

    yield from each(op, "ragged", pooling(2, 3, 9, 13, 8), quick=(FP32, BF16))
    first = {"aligned": False, "ratio": 2, "scale": 0.25}
    yield from each(op, "of the first version", pooling(1, 5, 10, 8, 6, **first), quick=(FP16,))
    wide = {"size": (5, 4), "ratio": 1}
    yield from each(op, "several blocks of bins", pooling(2, 3, 9, 6, 7, **wide), quick=(FP32,), settings=few)
    yield from each(op, "many channels", pooling(1, 70, 8, 8, 3, ratio=1))
    yield from each(op, "one", pooling(1, 1, 1, 1, 1, size=(1, 1), ratio=1))
