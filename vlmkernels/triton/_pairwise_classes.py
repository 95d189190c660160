"""Shared by the losses of a linear layer's classes: rows in chunks, and the gradients of the layer."""

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _tiles as tiles

CHUNK_BYTES = 1 << 28  # of what has a column for each class, or that of `_pairwise.CHUNK_ROWS` rows


@triton.jit
def _move_rows(
    X,  # [rows, depth]
    FACTOR,  # [1] or None
    TARGET,  # [n] int64 or None: every row counts
    ORDER,  # [n] int64, rows that count come first; or None: rows are where they are
    OUT,  # [rows, depth]
    stride_x,
    start,  # of the chunk, in that order
    depth,
    ignore_index,  # the target of a row that does not count
    PUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of a chunk, taken from its place or put there, times the factor; 0 if it does not count."""
    row = tl.program_id(0).to(tl.int64)
    place = start + row
    if ORDER is not None:
        place = tl.load(ORDER + place)
    counted = True
    if TARGET is not None:
        counted = tl.load(TARGET + place) != ignore_index
    if PUT:
        X += row * stride_x
        OUT += place * depth
    else:
        X += place * stride_x
        OUT += row * depth
    for first in range(0, depth, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(X + cols, mask=(cols < depth) & counted, other=0.0)
        if FACTOR is not None:
            x *= tl.load(FACTOR)
        tl.store(OUT + cols, x.to(OUT.dtype.element_ty), mask=cols < depth)


def _count(counted: Tensor) -> Callable[[], int]:
    """How many rows count. The host waits when it asks, for what was queued before this call and no longer.

    It cannot wait while a CUDA graph is captured, which then has to do for all of them.
    """
    if counted.device.type == "cpu":
        return lambda: int(counted.sum())
    if torch.cuda.is_current_stream_capturing():
        return lambda: len(counted)
    count, copied = torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
    count.copy_(counted.sum(), non_blocking=True)
    copied.record()

    def wait() -> int:
        copied.synchronize()
        return int(count)

    return wait


def _chunks(n: int, held: int, count: Callable[[], int]) -> Iterator[tuple[int, int]]:
    """Where the chunks begin and end; the first one is at work when the host asks how many there are."""
    if n:
        yield 0, min(held, n)
    for start in range(held, count() if n > held else 0, held):
        yield start, min(start + held, n)


class Rows:
    """The rows of a batch in chunks. If there are several, those that count come first, and chunks without
    any are left out.
    """

    def __init__(self, n: int, held: int, target: Tensor | None, ignore_index: int):
        self.n, self.held, self.target, self.ignore_index = n, held, target, ignore_index
        self.order: Tensor | None = None  # [n]
        self.count: Callable[[], int] = lambda: n
        if target is not None and n > held:
            counted = target != ignore_index
            self.order, self.count = counted.byte().argsort(stable=True, descending=True), _count(counted)

    def chunks(self) -> Iterator[tuple[int, int]]:
        return _chunks(self.n, self.held, self.count)

    def ordered(self, x: Tensor | None) -> Tensor | None:
        """The values of all rows, in the order of the chunks."""
        return x if x is None or self.order is None else x.index_select(0, self.order)

    def empty(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Memory that all rows write; 0 where chunks may be left out."""
        return (like.new_empty if self.order is None else like.new_zeros)(shape, dtype=dtype)

    def take(self, x: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
        """The rows of a chunk, in `out` if some may not count: those are 0 there."""
        if self.target is None:
            return x[start:stop]
        self._move(x, None, start, out[: stop - start], put=False)
        return out[: stop - start]

    def put(self, x: Tensor, factor: Tensor | None, start: int, out: Tensor) -> None:
        """The rows of a chunk times the factor, to their places in `out`; 0 for those that do not count."""
        self._move(x, factor, start, out, put=True)

    def _move(self, x: Tensor, factor: Tensor | None, start: int, out: Tensor, *, put: bool) -> None:
        """8 elements of a lane make a wide access of 16-bit types."""
        depth = x.shape[1]
        block = max(16, min(tiles.next_power_of_2(depth), 2048))
        _move_rows[(len(x if put else out),)](
            x, factor, self.target, self.order, out, x.stride(0), start, depth, self.ignore_index, PUT=put,
            BLOCK=block, num_warps=max(1, min(block // 256, 8)), enable_fp_fusion=True,
        )  # fmt: skip


class LayerGrads:
    """dh = g W, dW = g^T h and db = sum g of a layer z = h W^T + b, from g of a chunk of rows after another.

    Sums are float32; g carries the factor `gain`, which the results do not.
    """

    def __init__(
        self,
        rows: Rows,
        hidden: Tensor,  # [n, depth]
        weight: Tensor,  # [classes, depth]
        bias: Tensor | None,  # [classes]
        needs: Sequence[bool],
        gain: Tensor | None,  # []
    ):
        self.rows, self.weight, self.needs = rows, weight, needs
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        self.inv_gain = None if gain is None else gain.reciprocal()
        need_hidden, need_weight, need_bias = needs
        self.dhidden = rows.empty(hidden, hidden.shape if need_hidden else (0,))

        def sums(shape: Sequence[int], dtype: torch.dtype, need: bool) -> Tensor:
            make = hidden.new_empty if rows.n else hidden.new_zeros
            return make(shape, dtype=torch.float32) if need else hidden.new_empty(0, dtype=dtype)

        self.weight_sums = sums(weight.shape, weight.dtype, need_weight)
        self.bias_sums = sums(weight.shape[:1], self.bias_dtype, need_bias)
        self.ones = hidden.new_ones((1, rows.held)) if need_bias else None
        self.in_place = rows.target is None and hidden.dtype == torch.float32
        held = rows.held if need_hidden and not self.in_place else 0
        self.products = hidden.new_empty((held, hidden.shape[1]), dtype=torch.float32)

    def add(
        self,
        g: Tensor,  # [size, classes]
        h: Tensor,  # [size, depth]
        start: int,
    ) -> None:
        size, add = len(g), start > 0
        need_hidden, need_weight, _ = self.needs
        if need_hidden:
            out = self.dhidden[start : start + size] if self.in_place else self.products[:size]
            tiles.product(g, self.weight, out)
            if not self.in_place:
                self.rows.put(out, self.inv_gain, start, self.dhidden)
        if need_weight:
            tiles.product(g.T, h, self.weight_sums, add=add)
        if self.ones is not None:
            tiles.product(self.ones[:, :size], g, self.bias_sums[None], add=add)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dhidden, dweight, dbias), of size 0 where not needed."""
        for x in (self.weight_sums, self.bias_sums):
            if self.inv_gain is not None and x.numel():
                x *= self.inv_gain
        return self.dhidden, self.weight_sums.to(self.weight.dtype), self.bias_sums.to(self.bias_dtype)
