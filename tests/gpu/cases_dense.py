"""The cases of the kernels between the products of linear, mlp and gated_mlp."""

from collections.abc import Callable, Iterator

from vlmkernels.reference._dense import ACTIVATIONS
from vlmkernels.triton import _dense, gated_residual

from .trials import DTYPES
from .trials_dense import Layer

FP32, BF16, FP16 = DTYPES


def layers(each: Callable[..., Iterator]) -> Iterator:
    """The cases, made by `each` of cases.py."""
    few = {(gated_residual, "PROGRAMS"): 4, (gated_residual, "PARTS"): 32, (_dense, "CHAIN"): 2}

    def case(op, n, *sizes, **options):
        return lambda t: Layer(op, n, sizes, t, **options)

    yield from each("linear", "ragged", case("linear", 70, 37, 300), quick=(FP32, BF16), settings=few)
    make = case("mlp", 37, 40, 130, 20, activation="silu")
    yield from each("mlp", "ragged", make, quick=(FP16,), settings=few)
    make = case("gated_mlp", 37, 40, 130, 20, activation="gelu_tanh", residual=BF16)
    yield from each("gated_mlp", "ragged", make, quick=(FP32, BF16), settings=few)
    for power in range(9):  # every tile
        n, width = gated_residual.TILE // 2**power + 1, max(1, 2**power - power // 3)
        yield from each("linear", f"{n} rows of {width}", case("linear", n, 3, width), settings=few)
    for op, *sizes in (("linear", 20, 45), ("mlp", 20, 45, 5), ("gated_mlp", 20, 45, 5)):
        for name in ACTIVATIONS:
            yield from each(op, name, case(op, 9, *sizes, activation=name, residual=FP32))
        make = case(op, 9, *sizes, bias=False, residual=FP16, activation="quick_gelu")
        yield from each(op, "no bias", make, quick=(FP16,))
        yield from each(op, "formed again", case(op, 9, *sizes, keep=False, activation="relu"))
        yield from each(op, "even", case(op, 16, *(16 * size for size in sizes)))
        yield from each(op, "one", case(op, 1, *(1 for _ in sizes)))
        count = 1 + len(case(op, 1, *sizes)(BF16).weights)
        for i in range(count):
            needs = tuple(i == k for k in range(count))
            yield from each(op, f"gradient {i}", case(op, 9, *sizes, needs=needs), (BF16,))
