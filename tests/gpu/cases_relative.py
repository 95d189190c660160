"""The cases of relative_representation, relative_similarity and contrastive_search_score."""

from collections.abc import Callable, Iterator

from vlmkernels.triton import contrastive_search_score, relative_representation, relative_similarity

from .trials import DTYPES, far
from .trials_relative import Powers, Search, Sparse

FP32, BF16, FP16 = DTYPES
HALF = (BF16, FP16)


def relative(each: Callable[..., Iterator]) -> Iterator:
    """The cases, made by `each` of cases.py."""
    op, few = "relative_representation", {(relative_representation, "HELD"): 32}

    def powers(n, k, **options):
        return lambda t: Powers(n, k, t, **options)

    yield from each(op, "ragged", powers(70, 37), quick=(FP32, BF16))
    yield from each(op, "long", powers(7, 100), quick=(FP16,), settings=few)
    yield from each(op, "fraction", powers(70, 37, p=2.5), quick=(FP32,))
    yield from each(op, "fraction alone, long", powers(7, 70, p=0.5), settings=few)
    yield from each(op, "large power", powers(9, 45, p=301.0))
    yield from each(op, "even", powers(9, 64, p=3.0))
    yield from each(op, "one", powers(1, 1))
    for power in range(14):  # every tile
        k = max(1, 2**power - power // 3)
        n = relative_representation.blocks(k)["BLOCK_R"] + 1
        yield from each(op, f"{n} rows of {k}", powers(n, k))

    def far_rows(dtype):
        trial = Powers(3, 32, dtype)
        trial.similarities = far(trial.similarities)
        return trial

    yield from each(op, "far rows", far_rows, (BF16,), quick=(BF16,), far=True)

    op, few = "relative_similarity", {(relative_similarity, "ENTRIES"): 16}

    def sparse(*sizes, **options):
        return lambda t: Sparse(*sizes, t, **options)

    yield from each(op, "ragged", sparse(3, 21, 19, 20, 40), quick=(FP32, BF16), settings=few)
    yield from each(op, "one block", sparse(2, 33, 17, 5, 64), quick=(FP16,))
    yield from each(op, "of powers of 2", sparse(3, 64, 16, 32, 100), settings=few)
    yield from each(op, "few in common", sparse(2, 40, 5, 70, 1000), settings=few)
    yield from each(op, "all in common", sparse(4, 50, 3, 50, 50), settings=few)
    yield from each(op, "one", sparse(1, 1, 1, 1, 1))
    yield from each(op, "float32 texts", sparse(2, 9, 5, 7, 12, texts=FP32), HALF)

    op, few = "contrastive_search_score", {(contrastive_search_score, "CANDIDATES"): 16}
    few |= {(contrastive_search_score, "TOKENS"): 16, (contrastive_search_score, "FEATURES"): 16}

    def search(*sizes, **options):
        return lambda t: Search(*sizes, t, **options)

    yield from each(op, "ragged", search(2, 21, 19, 37), quick=(FP32, BF16), settings=few)
    yield from each(op, "lengths", search(3, 5, 20, 40, lengths=True), quick=(FP16,), settings=few)
    yield from each(op, "without an image", search(2, 7, 5, 20, guided=False), quick=(FP32,), settings=few)
    yield from each(op, "without the context", search(2, 20, 5, 20, alpha=0.0), quick=(BF16,), settings=few)
    yield from each(op, "greedy", search(2, 20, 5, 20, alpha=0.0, guided=False))
    yield from each(op, "the context alone", search(2, 9, 12, 50, alpha=1.0, guided=False, lengths=True))
    make = search(2, 9, 19, 20, alike=False, lengths=True)
    yield from each(op, "no token is alike", make, quick=(FP32,), settings=few)
    yield from each(op, "no token", search(2, 9, 0, 50))
    yield from each(op, "even", search(2, 16, 32, 64))
    yield from each(op, "wide", search(2, 45, 16, 200))
    yield from each(op, "one", search(1, 1, 1, 1))
    yield from each(op, "float32 probabilities", search(2, 9, 5, 20, scorer=FP32), HALF)
