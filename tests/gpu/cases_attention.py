"""The cases of the kernels of interval_attention and perceiver_attention."""

from collections.abc import Callable, Iterator

import torch

from vlmkernels import intervals
from vlmkernels.triton import _attention_bwd
from vlmkernels.triton import interval_attention as attention

from .trials import DTYPES, far
from .trials_attention import Interval, Perceiver, any_intervals, problem

FP32, BF16, FP16 = DTYPES
HALF = (BF16, FP16)


def attended(size, mask="causal", *, bias=None, padding=3, **options) -> Callable[[torch.dtype], Interval]:
    """size: batches, heads, heads of keys, queries, keys, width of keys, width of values."""

    def make(dtype):
        b, h, _, tq, tk = size[:5]
        bounds = {
            "causal": lambda: intervals.causal(tq, offset=max(tk - tq, 0)),
            "any": lambda: any_intervals(b, tq, tk),
            "none": lambda: (torch.full((tq,), 5), torch.full((tq,), 5)),
            "padding": lambda: intervals.padding(torch.randint(tk, (b,)), tq),
        }[mask]()
        table = torch.randn(h, 2 * bias[0] - 1, 2 * bias[1] - 1) if bias else None
        inputs = problem(*size, dtype, padding)
        return Interval(*inputs, *bounds, bias=table, grid=bias or (0, 0), **options)

    return make


def attentions(each: Callable[..., Iterator]) -> Iterator:
    """The cases, made by `each` of cases.py."""
    op = "interval_attention"
    yield from each(op, "causal", attended((1, 2, 1, 129, 150, 64, 64)), quick=(BF16,))
    yield from each(op, "any interval", attended((2, 2, 1, 37, 45, 20, 24), "any"), quick=(FP32, FP16))
    yield from each(op, "nothing", attended((1, 1, 1, 20, 30, 16, 16), "none"))
    yield from each(op, "one", attended((1, 1, 1, 1, 1, 1, 1)))
    aligned = attended((1, 2, 1, 37, 45, 24, 40), padding=0)
    yield from each(op, "heads of 24, aligned", aligned, quick=(FP32, BF16))
    yield from each(op, "negative scale", attended((1, 2, 1, 37, 45, 16, 16), scale=-0.7), quick=(BF16,))
    yield from each(op, "padding", attended((3, 1, 1, 37, 140, 16, 16), "padding"), quick=(BF16,))
    frozen = attended((2, 2, 1, 37, 45, 20, 22), "any", needs=[False, True, True, False])
    yield from each(op, "frozen queries", frozen, quick=(FP32, BF16))
    ranges = {(_attention_bwd, "RANGE_ROWS"): 16}
    yield from each(
        op,
        "ranges of rows",
        attended((1, 4, 2, 70, 140, 16, 16), "any", dlse=False),
        settings=ranges,
        quick=(BF16,),
    )
    for width, dtypes in ((80, DTYPES), (128, DTYPES), (130, HALF), (256, HALF)):
        size = (1, 1, 1, 140, 135, width, width)
        yield from each(op, f"heads of {width}", attended(size, "any"), dtypes)
    for width, dtypes in ((16, DTYPES), (80, DTYPES), (130, HALF)):
        size = (2, 1, 1, 74, 70, width, width)
        yield from each(
            op,
            f"bias, heads of {width}",
            attended(size, bias=(2, 35)),
            dtypes,
            quick=(BF16,) if width == 16 else (),
        )
    aligned = attended((2, 1, 1, 10, 10, 16, 24), bias=(2, 5), padding=0)
    yield from each(op, "bias, aligned", aligned)
    together = {(attention, "BIAS_PROGRAMS"): 1}
    yield from each(
        op, "bias, batches together", attended((3, 2, 1, 10, 10, 16, 24), "any", bias=(2, 5)),
        quick=(FP32,), settings=together,
    )  # fmt: skip
    for name, needed in (("query", 0), ("key", 1), ("value", 2), ("bias", 3)):
        needs = [i == needed for i in range(4)]
        size = (1, 2, 2, 20, 30, 16, 16)
        yield from each(op, f"gradient of the {name}", attended(size, bias=(2, 5), needs=needs, dlse=False))
    for width in (64, 100):
        size = (1, 1, 1, 70, 75, width, width)
        yield from each(op, f"tf32, heads of {width}", attended(size, tf32=True), (FP32,), tf32=True)
        make = attended(size, bias=(2, 35), tf32=True)
        yield from each(op, f"tf32, bias, heads of {width}", make, (FP32,), tf32=True)

    def distant(axis):  # axis 1: heads; axis 2: queries, keys and values
        def make(dtype):
            shape = [1, 1, 1, 20]
            shape[axis] = 3
            tensors = (far(torch.randn(3, 20).to(dtype)).view(shape) for _ in range(3))
            bias = {"bias": torch.randn(3, 1, 5), "grid": (1, 3)} if axis == 1 else {}
            return Interval(*tensors, *intervals.causal(shape[2]), **bias)

        return make

    yield from each(op, "far rows", distant(2), (BF16,), quick=(BF16,), far=True)
    yield from each(op, "far heads", distant(1), (BF16,), quick=(BF16,), far=True)

    op = "perceiver_attention"
    lengths = (50, 17, 0)
    yield from each(op, "lengths", lambda t: Perceiver(33, 50, 33, lengths, t), quick=(FP32, FP16))
    yield from each(op, "all", lambda t: Perceiver(9, 70, 9, None, t), quick=(BF16,))
    yield from each(op, "no latents", lambda t: Perceiver(20, 40, 0, (40, 0, 3, -2), t))
    yield from each(op, "media alone", lambda t: Perceiver(5, 0, 5, None, t))
    for width, dtypes in ((64, DTYPES), (128, DTYPES), (130, HALF)):
        widths = (width, width)
        yield from each(
            op, f"heads of {width}", lambda t, w=widths: Perceiver(70, 75, 70, (75,), t, widths=w), dtypes
        )
    for width in (64, 100):
        widths = (width, width)
        make = lambda t, w=widths: Perceiver(35, 40, 35, (40,), t, widths=w, tf32=True)  # noqa: E731
        yield from each(op, f"tf32, heads of {width}", make, (FP32,), tf32=True)
