"""Kernels of interval_attention and perceiver_attention: a softmax streamed over one or two key sources."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from vlmkernels.reference._attention import empty_heads_merged
from vlmkernels.triton._tiles import architecture, rows_contiguous, tf32_allowed

NOTHING: tl.constexpr = tl.constexpr(-3e38)  # the maximum of no logits, finite: its distance to itself is 0
LOG2E = 1.4426950408889634


@triton.jit
def places(X, rows, stride, width, STEP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses [BLOCK, BLOCK_D] of rows of X [.., width], and which columns exist.

    With STEP > 1 rows begin and end at multiples of STEP elements, 16 bytes, which are then moved at once.
    """
    cols = tl.arange(0, BLOCK_D)
    at = X + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    exists = (cols < width)[None, :]
    if STEP > 1:
        at = tl.multiple_of(at, [1, 16])
        exists = tl.max_constancy(exists, [1, STEP])
    return at, exists


@triton.jit
def tile(
    X, rows, stride, n, width,
    MASKED: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of X [n, width] as [BLOCK, BLOCK_D], 0 past the end; without MASKED all rows exist."""
    at, exists = places(X, rows, stride, width, STEP, BLOCK_D)
    if MASKED:
        if EVEN:
            x = tl.load(at, mask=(rows < n)[:, None], other=0.0)
        else:
            x = tl.load(at, mask=(rows < n)[:, None] & exists, other=0.0)
    elif EVEN:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=exists, other=0.0)
    return x


@triton.jit
def put(X, x, rows, stride, n, width, STEP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows x [BLOCK, BLOCK_D] to X [n, width]."""
    at, exists = places(X, rows, stride, width, STEP, BLOCK_D)
    tl.store(at, x.to(X.dtype.element_ty), mask=(rows < n)[:, None] & exists)


@triton.jit
def signed(x, scale):
    """x with the sign of the scale, 0 for a scale of 0: the rest of the scale, `factor`, is positive."""
    return (x * tl.where(scale < 0, -1.0, tl.where(scale == 0, 0.0, 1.0))).to(x.dtype)


@triton.jit
def power(x, LOG_E: tl.constexpr):
    """The base of the logits, e for LOG_E = 1 or 2 for LOG_E = log2(e), to the power of x."""
    if LOG_E == 1:
        y = tl.exp(x)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def intervals(START, END, batch, rows, stride_sb, stride_st, stride_eb, stride_et, tq, tk):
    """[start, end) of each row within [0, tk), [0, 0) for empty rows and rows past the end."""
    inside = rows < tq
    start = tl.zeros_like(rows)
    end = start + tk
    if START is not None:
        bound = tl.load(START + batch * stride_sb + rows.to(tl.int64) * stride_st, mask=inside, other=0)
        start = tl.minimum(tl.maximum(bound, 0), tk).to(tl.int32)
    if END is not None:
        bound = tl.load(END + batch * stride_eb + rows.to(tl.int64) * stride_et, mask=inside, other=0)
        end = tl.minimum(tl.maximum(bound, 0), tk).to(tl.int32)
    seen = inside & (end > start)
    return tl.where(seen, start, 0), tl.where(seen, end, 0)


@triton.jit
def key_bounds(start, end, inside, tk, BLOCK_N: tl.constexpr):
    """lo <= a <= b, hi: some row sees keys of [lo, hi); every row sees all of the blocks of [a, b)."""
    seen = end > start
    lo, hi = tl.min(tl.where(seen, start, tk), 0), tl.max(end, 0)
    last_start = tl.max(tl.where(inside, tl.where(seen, start, tk), 0), 0)
    first_end = tl.min(tl.where(inside, end, tk), 0)
    a = lo + tl.cdiv(tl.maximum(last_start - lo, 0), BLOCK_N) * BLOCK_N
    return lo, a, a + tl.maximum(first_end - a, 0) // BLOCK_N * BLOCK_N, hi


@triton.jit
def grid_bias(TABLE, i, j, grid_rows, grid_cols):
    """The relative bias of queries i and keys j (of shapes that broadcast)."""
    wide = 2 * grid_cols - 1
    at_i = i // grid_cols * wide + i % grid_cols + (grid_rows - 1) * wide + grid_cols - 1
    at_j = j // grid_cols * wide + j % grid_cols
    on_grid = (i < grid_rows * grid_cols) & (j < grid_rows * grid_cols)
    return tl.load(TABLE + (at_i - at_j), mask=on_grid, other=0.0).to(tl.float32)


@triton.jit
def attend(
    acc,  # [BLOCK_M, BLOCK_V] float32: values weighted below the maximum `high`
    high,  # [BLOCK_M]
    total,  # [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
    rows,  # [BLOCK_M]
    start,  # [BLOCK_M]
    end,  # [BLOCK_M]
    lo,
    hi,
    K,  # [tk, width]
    V,  # [tk, value_width]
    TABLE,  # [2 grid_rows - 1, 2 grid_cols - 1] or None
    stride_k,
    stride_v,
    tk,
    width,
    value_width,
    grid_rows,
    grid_cols,
    factor,
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LOG_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Continues the softmax over blocks of keys from lo to hi."""
    unit = factor if TABLE is None else 1.0  # of s
    for first in range(lo, hi, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        k = tile(K, cols, stride_k, tk, width, MASKED, EVEN_D, STEP, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TABLE is not None:
            s = s * factor + grid_bias(TABLE, rows[:, None], cols[None, :], grid_rows, grid_cols) * LOG_E
        if MASKED:
            seen = (cols[None, :] >= start[:, None]) & (cols[None, :] < end[:, None])
            s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(high, tl.max(s, 1) * unit)
        p = power(s * unit - higher[:, None], LOG_E)
        shrink = power(high - higher, LOG_E)
        total = total * shrink + tl.sum(p, 1)
        v = tile(V, cols, stride_v, tk, value_width, MASKED, EVEN_V, STEP, BLOCK_V)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        high = higher
    return acc, high, total


@triton.jit
def _forward(
    Q,  # [B, heads, tq, width]
    K,  # [B, heads / group, tk, width]
    V,  # [B, heads / group, tk, value_width]
    K2,  # [B, heads / group, tk2, width] or None: a second source, every row sees all of it
    V2,  # [B, heads / group, tk2, value_width] or None
    START,  # [B, tq] by its strides, or None for 0
    END,  # [B, tq] by its strides, or None for tk
    TABLE,  # [heads, 2 grid_rows - 1, 2 grid_cols - 1] or None
    OUT,  # [B, heads, tq, value_width]
    LSE,  # [B, heads, tq] float32
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_k2b, stride_k2h, stride_k2t, stride_v2b, stride_v2h, stride_v2t, stride_ob, stride_oh, stride_ot,
    stride_sb, stride_st, stride_eb, stride_et,
    heads, group, tq, tk, tk2, width, value_width, grid_rows, grid_cols, scale, factor,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, LOG_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tq, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # under a causal mask the longest first
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tq
    start, end = intervals(START, END, batch, rows, stride_sb, stride_st, stride_eb, stride_et, tq, tk)
    lo, a, b, hi = key_bounds(start, end, inside, tk, BLOCK_N)
    Q += batch * stride_qb + head * stride_qh
    q = signed(tile(Q, rows, stride_qt, tq, width, True, EVEN_D, STEP, BLOCK_D), scale)
    K += batch * stride_kb + head // group * stride_kh
    V += batch * stride_vb + head // group * stride_vh
    if TABLE is not None:
        TABLE += head * (2 * grid_rows - 1) * (2 * grid_cols - 1)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    high = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begins, ends = (lo, a, b), (tl.minimum(a, hi), b, hi)
    for part in tl.static_range(3):
        acc, high, total = attend(
            acc, high, total, q, rows, start, end, begins[part], ends[part], K, V, TABLE, stride_kt,
            stride_vt, tk, width, value_width, grid_rows, grid_cols, factor, part != 1, EVEN_D, EVEN_V, STEP,
            BLOCK_N, BLOCK_D, BLOCK_V, LOG_E, PRECISION,
        )  # fmt: skip
    if K2 is not None:
        K2 += batch * stride_k2b + head // group * stride_k2h
        V2 += batch * stride_v2b + head // group * stride_v2h
        start, end = intervals(None, None, batch, rows, 0, 0, 0, 0, tq, tk2)
        acc, high, total = attend(
            acc, high, total, q, rows, start, end, 0, tk2, K2, V2, None, stride_k2t, stride_v2t, tk2, width,
            value_width, grid_rows, grid_cols, factor, True, EVEN_D, EVEN_V, STEP, BLOCK_N, BLOCK_D, BLOCK_V,
            LOG_E, PRECISION,
        )  # fmt: skip
    none = total == 0
    lse = tl.where(none, -float("inf"), high / LOG_E + tl.log(tl.where(none, 1.0, total)))
    tl.store(LSE + (batch * heads + head) * tq + rows, lse, mask=inside)
    out = tl.where(none[:, None], 0.0, acc / tl.where(none, 1.0, total)[:, None])
    put(OUT + batch * stride_ob + head * stride_oh, out, rows, stride_ot, tq, value_width, STEP, BLOCK_V)


class Source(NamedTuple):
    """Keys and values, and the interval of them that each query sees: all where a bound is None."""

    key: Tensor  # [B, Hkv, Tk, Dh]
    value: Tensor  # [B, Hkv, Tk, Dv]
    start: Tensor | None  # [B, Tq]
    end: Tensor | None  # [B, Tq]

    def rows_contiguous(self) -> "Source":
        return self._replace(key=rows_contiguous(self.key), value=rows_contiguous(self.value))

    def strides(self) -> list[int]:
        return [*self.key.stride()[:3], *self.value.stride()[:3]]

    def interval_strides(self) -> list[int]:
        return [s for bound in (self.start, self.end) for s in ((0, 0) if bound is None else bound.stride())]


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


Tiles = dict[tuple[bool, int], Tile]  # by (inputs of 16 bits, padded width of a head)
Exceptions = dict[str, dict[tuple[bool, int, bool], Tile]]  # by architecture and (.., .., with a bias)
# With its exceptions none spills inside a loop on sm_80, sm_90, sm_100, sm_120 or gfx942
FORWARD: Tiles = {
    (True, 64): Tile(128, 64, 8, 3),
    (True, 128): Tile(128, 64, 8, 2),
    (True, 256): Tile(32, 32, 4, 2),
    (False, 64): Tile(32, 32, 4, 2),
    (False, 128): Tile(16, 32, 4, 2),
}
FORWARD_ON: Exceptions = {
    "sm_90": {(True, width, False): Tile(128, 128, 8, 2) for width in (64, 128)},
}
# Pipelines of Triton 3.6 prefetch vectors number by number, at the price of registers
PIPELINES_NUMBERS = TorchVersion(triton.__version__) < (3, 7)  # type: ignore[operator]
if PIPELINES_NUMBERS:
    FORWARD_ON |= {on: {(True, 64, True): Tile(128, 64, 8, 1)} for on in ("sm_80", "sm_86", "sm_89")}


def factor(scale: float, log_e: float) -> float:
    """What products of a `signed` tile are multiplied by for logits; positive, so that their order stays."""
    return max(abs(scale) * log_e, 2.0**-126)


def step(*tensors: Tensor) -> int:
    """Elements in 16 bytes if rows of all tensors [B, heads, T, width] begin and end at multiples, else 1."""
    size = 16 // tensors[0].element_size()
    for x in tensors:
        if x.data_ptr() % 16 or any(n % size for n in (*x.stride()[:3], x.shape[3])):
            return 1
    return size


def unsupported(query: Tensor, value: Tensor) -> bool:
    """float64, which tensor cores do not multiply on every GPU, and heads too wide for registers."""
    widest = {torch.float64: -1, torch.float32: 128}.get(query.dtype, 256)
    return max(query.shape[3], value.shape[3]) > widest


def block(size: int) -> int:
    """The power of two that is at least `size` and the smallest dimension of a tensor core."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def cdiv(size: int, block: int) -> int:  # Triton's takes microseconds, which launches wait for
    return -(-size // block)


def launch_options(
    tiles: Tiles,
    query: Tensor,
    value: Tensor,
    rows: int,
    cols: int,
    biased: bool,
    exceptions: Exceptions | None = None,
) -> dict:
    """The tile for a problem from its table, no larger than the problem."""
    width, value_width = query.shape[3], value.shape[3]
    block_d, block_v = block(width), block(value_width)
    half = query.dtype != torch.float32
    widest = max(block_d, block_v, 64)
    here = (exceptions or {}).get(architecture(query), {})
    chosen = here.get((half, widest, biased), tiles[half, widest])
    block_m = chosen.block_m
    if half and biased and widest > 64 and block_m >= chosen.block_n:
        block_m //= 2  # elements of the table are prefetched to shared memory too
    warps = chosen.num_warps
    if 32 < block_m > block(rows):  # rows are split among warps, and a warp multiplies 16
        warps = max(4, min(warps, block(rows) // 16))
    amd = torch.version.hip is not None
    if half or amd:
        precision = "ieee"
    else:
        precision = "tf32" if tf32_allowed() else "tf32x3"  # three products on tensor cores: 21 bits
    return {
        "EVEN_D": width == block_d,
        "EVEN_V": value_width == block_v,
        "BLOCK_M": min(block_m, block(rows)),
        "BLOCK_N": min(chosen.block_n, block(cols)),
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "LOG_E": LOG2E if half else 1.0,  # base 2 saves an instruction and costs the last bits
        "PRECISION": precision,
        "num_warps": warps // (2 if amd else 1),  # AMD's have 64 lanes
        "num_stages": 1 if amd else min(chosen.num_stages, 2 if biased else 3),  # prefetching spills there
        "enable_fp_fusion": True,
    }


def forward(
    query: Tensor,  # [B, H, Tq, Dh]
    source: Source,
    second: Source | None,
    scale: float,
    table: Tensor | None = None,  # [H, 2R-1, 2C-1]
    grid_rows: int = 0,
    grid_cols: int = 0,
) -> tuple[Tensor, Tensor]:
    """out [B, H, Tq, Dv] in memory [B, Tq, H, Dv], and lse [B, H, Tq] float32; 0 and -inf on empty rows."""
    b, h, tq, width = query.shape
    tk, value_width = source.value.shape[2:]
    out = empty_heads_merged(query, (b, h, tq, value_width))
    lse = query.new_empty((b, h, tq), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    query, source = rows_contiguous(query), source.rows_contiguous()
    second = second.rows_contiguous() if second is not None else None
    tk2 = second.key.shape[2] if second else 0
    exceptions = FORWARD_ON if tq > 64 else None  # four warps spill 128 keys
    options = launch_options(FORWARD, query, source.value, tq, max(tk, tk2), table is not None, exceptions)
    tensors = (query, *source[:2], *(second[:2] if second else ()), out)
    with torch.cuda.device_of(query):
        _forward[(cdiv(tq, options["BLOCK_M"]) * h * b,)](
            query, source.key, source.value, *((second.key, second.value) if second else (None, None)),
            source.start, source.end, table, out, lse,
            *query.stride()[:3], *source.strides(), *(second.strides() if second else [0] * 6),
            *out.stride()[:3], *source.interval_strides(), h, h // source.key.shape[1], tq, tk,
            tk2, width, value_width, grid_rows, grid_cols,
            scale, factor(scale, options["LOG_E"]), STEP=step(*tensors), **options,
        )  # fmt: skip
    return out, lse
