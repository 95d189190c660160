"""The cases of the retrieval ops."""

from collections.abc import Callable, Iterator

import torch

from vlmkernels.triton import _retrieval as retrieval
from vlmkernels.triton import _tiles as tiles

from .trials_retrieval import Mined, Ranks, TopK

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HALF = (BF16, FP16)


def searches(each: Callable, far: Callable) -> Iterator:
    large, chunks = {(tiles, "LARGE"): 0}, {(retrieval, "CHUNK_BYTES"): 0}
    tf32 = {"tf32": True}
    for op, trial, forms in (
        ("topk_similarity", TopK, ({}, {"normalize": True, "both": True})),
        ("retrieval_ranks", Ranks, ({}, {"form": "ids"})),
        (
            "mine_hard_negatives",
            Mined,
            ({"margin": 1.0}, {"form": "ids", "grouped": True, "normalize": True, "margin": 0.5}),
        ),
    ):

        def of(n, m, d, trial=trial, **options):
            return lambda t: trial(n, m, d, t, **options)

        first, second = forms
        yield from each(op, "ragged", of(70, 135, 37, **first), quick=(FP32, FP16))
        yield from each(op, "options", of(67, 70, 24, **second), quick=(BF16,))
        yield from each(op, "large tiles", of(135, 270, 100, **first), quick=(BF16,), settings=large)
        yield from each(op, "large tiles, options", of(135, 140, 64, **second), settings=large)
        yield from each(op, "NaN", of(5, 40, 16, nan=True, **first), quick=(FP32,))
        yield from each(op, "one", of(1, 1, 1, **first))
        yield from each(op, "tf32", of(70, 80, 100, **first), (FP32,), **tf32)
        yield from each(op, "tf32, large tiles", of(140, 150, 100, **first), (FP32,), settings=large, **tf32)
        few = of(3, 3, 32, **first)
        distant = lambda t, few=few: far(few(t), "query", "key")  # noqa: E731
        yield from each(op, "far rows", distant, (BF16,), quick=(BF16,), far=True)
        yield from each(op, "chunks", of(70, 600, 20, **first), quick=(FP16,), settings=chunks)
    yield from each("topk_similarity", "int8", lambda t: TopK(20, 90, 40, t, quantised=True), quick=(BF16,))
    make = lambda t: TopK(20, 90, 40, t, quantised=True, normalize=True)  # noqa: E731
    yield from each("topk_similarity", "int8, normalised", make)
    make = lambda t: TopK(5, 7, 3, t, both=True)  # noqa: E731
    yield from each("topk_similarity", "more than there are", make, quick=(FP32,))
    yield from each("topk_similarity", "float32 keys", lambda t: TopK(9, 40, 20, t, keys=FP32), HALF)
    yield from each("retrieval_ranks", "index", lambda t: Ranks(70, 90, 20, t, form="index"), quick=(FP32,))
    make = lambda t: Ranks(30, 40, 16, t, form="ids", nan=True)  # noqa: E731
    yield from each("retrieval_ranks", "NaN by id", make, quick=(FP32,))
    for form in ("pairs", "index", "ids"):
        make = lambda t, f=form: Mined(40, 90, 12, t, form=f, margin=0.5, grouped=True)  # noqa: E731
        yield from each("mine_hard_negatives", f"{form}, groups", make)
        yield from each("mine_hard_negatives", form, lambda t, f=form: Mined(40, 90, 12, t, form=f))
