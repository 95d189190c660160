"""Gradients of the attention kernels: one kernel over queries, one over keys and values, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference._attention import empty_heads_merged
from vlmkernels.triton._attention import (
    PIPELINES_NUMBERS,
    Exceptions,
    Source,
    Tile,
    Tiles,
    block,
    cdiv,
    factor,
    grid_bias,
    intervals,
    key_bounds,
    launch_options,
    power,
    put,
    signed,
    step,
    tile,
)

RANGE_ROWS = 1024  # queries that a program of _query_ranges reads at once


@triton.jit
def row_sums(dout, out, DLSE, at, inside):
    """<dout, out> - dlse of each row; fma rounds products before they are added, so that all lanes agree."""
    delta = tl.sum(tl.fma(dout.to(tl.float32), out.to(tl.float32), 0.0), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + at, mask=inside, other=0.0)
    return delta


@triton.jit
def _row_sums(
    DOUT,  # [B, heads, tq, value_width]
    OUT,  # [B, heads, tq, value_width]
    DLSE,  # [B, heads, tq] or None
    DELTA,  # [B, heads, tq] float32: <dout, out> - dlse
    stride_db, stride_dh, stride_dt, stride_ob, stride_oh, stride_ot, heads, tq, value_width,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, EVEN_V: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tq, BLOCK_M)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    DOUT += batch * stride_db + head * stride_dh
    OUT += batch * stride_ob + head * stride_oh
    dout = tile(DOUT, rows, stride_dt, tq, value_width, True, EVEN_V, STEP, BLOCK_V)
    out = tile(OUT, rows, stride_ot, tq, value_width, True, EVEN_V, STEP, BLOCK_V)
    at = (batch * heads + head) * tq + rows
    tl.store(DELTA + at, row_sums(dout, out, DLSE, at, rows < tq), mask=rows < tq)


@triton.jit
def query_grads(
    dq,  # [BLOCK_M, BLOCK_D] float32
    q,  # [BLOCK_M, BLOCK_D]
    dout,  # [BLOCK_M, BLOCK_V]
    lse,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    rows, start, end, lo, hi,
    K,  # [tk, width]
    V,  # [tk, value_width]
    TABLE,  # [2 grid_rows - 1, 2 grid_cols - 1] or None
    stride_k, stride_v, tk, width, value_width, grid_rows, grid_cols, factor,
    MASKED: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, STEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, LOG_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Continues dq / scale over blocks of keys from lo to hi."""
    unit = factor if TABLE is None else 1.0
    for first in range(lo, hi, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        k = tile(K, cols, stride_k, tk, width, MASKED, EVEN_D, STEP, BLOCK_D)
        v = tile(V, cols, stride_v, tk, value_width, MASKED, EVEN_V, STEP, BLOCK_V)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TABLE is not None:
            s = s * factor + grid_bias(TABLE, rows[:, None], cols[None, :], grid_rows, grid_cols) * LOG_E
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = power(s * unit - lse[:, None], LOG_E) * (dp - delta[:, None])
        if MASKED:
            seen = (cols[None, :] >= start[:, None]) & (cols[None, :] < end[:, None])
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _query_grads(
    Q, K, V, K2, V2, START, END, TABLE,  # as in _forward
    DOUT,  # [B, heads, tq, value_width]
    OUT,  # [B, heads, tq, value_width]
    LSE,  # [B, heads, tq] float32
    DLSE,  # [B, heads, tq] or None
    DELTA,  # [B, heads, tq] float32: <dout, out> - dlse, for the other gradients
    DQ,  # [B, heads, tq, width]
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_k2b, stride_k2h, stride_k2t, stride_v2b, stride_v2h, stride_v2t, stride_db, stride_dh, stride_dt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    stride_sb, stride_st, stride_eb, stride_et,
    heads, group, tq, tk, tk2, width, value_width, grid_rows, grid_cols, scale, factor,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, LOG_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tq, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tq
    start, end = intervals(START, END, batch, rows, stride_sb, stride_st, stride_eb, stride_et, tq, tk)
    lo, a, b, hi = key_bounds(start, end, inside, tk, BLOCK_N)
    Q += batch * stride_qb + head * stride_qh
    q = signed(tile(Q, rows, stride_qt, tq, width, True, EVEN_D, STEP, BLOCK_D), scale)
    DOUT += batch * stride_db + head * stride_dh
    OUT += batch * stride_ob + head * stride_oh
    dout = tile(DOUT, rows, stride_dt, tq, value_width, True, EVEN_V, STEP, BLOCK_V)
    out = tile(OUT, rows, stride_ot, tq, value_width, True, EVEN_V, STEP, BLOCK_V)
    at = (batch * heads + head) * tq + rows
    delta = row_sums(dout, out, DLSE, at, inside)
    tl.store(DELTA + at, delta, mask=inside)
    lse = tl.load(LSE + at, mask=inside, other=0.0) * LOG_E
    K += batch * stride_kb + head // group * stride_kh
    V += batch * stride_vb + head // group * stride_vh
    if TABLE is not None:
        TABLE += head * (2 * grid_rows - 1) * (2 * grid_cols - 1)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begins, ends = (lo, a, b), (tl.minimum(a, hi), b, hi)
    for part in tl.static_range(3):
        dq = query_grads(
            dq, q, dout, lse, delta, rows, start, end, begins[part], ends[part], K, V, TABLE, stride_kt,
            stride_vt, tk, width, value_width, grid_rows, grid_cols, factor, part != 1, EVEN_D, EVEN_V, STEP,
            BLOCK_N, BLOCK_D, BLOCK_V, LOG_E, PRECISION,
        )  # fmt: skip
    if K2 is not None:
        K2 += batch * stride_k2b + head // group * stride_k2h
        V2 += batch * stride_v2b + head // group * stride_v2h
        start, end = intervals(None, None, batch, rows, 0, 0, 0, 0, tq, tk2)
        dq = query_grads(
            dq, q, dout, lse, delta, rows, start, end, 0, tk2, K2, V2, None, stride_k2t, stride_v2t, tk2,
            width, value_width, grid_rows, grid_cols, factor, True, EVEN_D, EVEN_V, STEP, BLOCK_N, BLOCK_D,
            BLOCK_V, LOG_E, PRECISION,
        )  # fmt: skip
    put(DQ + batch * stride_gb + head * stride_gh, dq * scale, rows, stride_gt, tq, width, STEP, BLOCK_D)


@triton.jit
def _query_ranges(
    START, END,  # as in _forward
    RANGES,  # [programs / key blocks, key blocks, 3] int32: first, whole, last of a block as in _key_grads
    stride_sb, stride_st, stride_eb, stride_et, tq, tk,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tk, BLOCK_N)
    lo = tl.program_id(0) % blocks * BLOCK_N
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.full([ROWS], 0, tl.int32) + tq
    last = tl.zeros([ROWS], tl.int32)
    for before in range(0, tq, ROWS):
        rows = before + tl.arange(0, ROWS)
        start, end = intervals(START, END, batch, rows, stride_sb, stride_st, stride_eb, stride_et, tq, tk)
        seen = (start < lo + BLOCK_N) & (end > lo)
        first = tl.minimum(first, tl.where(seen, rows, tq))
        last = tl.maximum(last, tl.where(seen, rows + 1, 0))
    end_of_all = tl.max(last, 0)
    whole = tl.zeros([ROWS], tl.int32)
    for before in range(0, end_of_all, ROWS):
        rows = before + tl.arange(0, ROWS)
        start, end = intervals(START, END, batch, rows, stride_sb, stride_st, stride_eb, stride_et, tq, tk)
        partly = (start > lo) | (end < tl.minimum(lo + BLOCK_N, tk))
        whole = tl.maximum(whole, tl.where(partly & (rows < end_of_all), rows + 1, 0))
    at = RANGES + 3 * tl.program_id(0)
    tl.store(at, tl.min(first, 0))
    tl.store(at + 1, tl.maximum(tl.max(whole, 0), tl.min(first, 0)))
    tl.store(at + 2, end_of_all)


@triton.jit
def numbers(X, rows, n, MASKED: tl.constexpr):
    """Rows of X [n], 0 past the end; without MASKED all exist."""
    if MASKED:
        x = tl.load(X + rows, mask=rows < n, other=0.0)
    else:
        x = tl.load(X + rows)
    return x


@triton.jit
def key_grads(
    dk,  # [BLOCK_N, BLOCK_D] float32
    dv,  # [BLOCK_N, BLOCK_V] float32
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_V]
    cols, lo, hi, gap, behind,
    Q,  # [tq, width]
    DOUT,  # [tq, value_width]
    LSE,  # [tq]
    DELTA,  # [tq]
    START, END, batch,
    TABLE,  # [2 grid_rows - 1, 2 grid_cols - 1] or None
    stride_qt, stride_dt, stride_sb, stride_st, stride_eb, stride_et,
    tq, tk, width, value_width, grid_rows, grid_cols, factor,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    MASKED: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, LOG_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Continues dk / scale and dv over blocks of queries from lo to hi; from `gap` on they lie `behind`."""
    unit = factor if TABLE is None else 1.0
    for before in range(lo, hi, BLOCK_M):
        rows = before + tl.arange(0, BLOCK_M)
        if MASKED:
            rows += tl.where(before < gap, 0, behind)
        q = tile(Q, rows, stride_qt, tq, width, MASKED, EVEN_D, STEP, BLOCK_D)
        dout = tile(DOUT, rows, stride_dt, tq, value_width, MASKED, EVEN_V, STEP, BLOCK_V)
        lse = numbers(LSE, rows, tq, MASKED) * LOG_E
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if TABLE is not None:
            s = s * factor + grid_bias(TABLE, rows[None, :], cols[:, None], grid_rows, grid_cols) * LOG_E
        p = power(s * unit - lse[None, :], LOG_E)
        if MASKED:
            start, end = intervals(
                START, END, batch, rows, stride_sb, stride_st, stride_eb, stride_et, tq, tk
            )
            p = tl.where((cols[:, None] >= start[None, :]) & (cols[:, None] < end[None, :]), p, 0.0)
        if NEED_V:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if NEED_K:
            delta = numbers(DELTA, rows, tq, MASKED)
            ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _key_grads(
    Q, K, V, START, END, TABLE,  # as in _forward
    RANGES,  # [B or 1, key blocks, 3] int32, or None where all queries see the same keys
    DOUT,  # [B, heads, tq, value_width]
    LSE,  # [B, heads, tq] float32
    DELTA,  # [B, heads, tq] float32 or None without DK
    DK,  # [B, heads / group, tk, width] or None
    DV,  # [B, heads / group, tk, value_width] or None
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_gb, stride_gh, stride_gt, stride_wb, stride_wh, stride_wt,
    stride_sb, stride_st, stride_eb, stride_et, stride_rb,
    heads, group, tq, tk, width, value_width, grid_rows, grid_cols, scale, factor,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, LOG_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tk, BLOCK_N)
    block = tl.program_id(0) % blocks
    key_head = (tl.program_id(0) // blocks % (heads // group)).to(tl.int64)
    batch = (tl.program_id(0) // blocks // (heads // group)).to(tl.int64)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Queries from first to last see keys of the block, those from whole on all of them
    if RANGES is not None:
        at = RANGES + batch * stride_rb + 3 * block
        first, whole, last = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    else:
        begin, stop = intervals(
            START, END, batch, tl.arange(0, 1), stride_sb, stride_st, stride_eb, stride_et, tq, tk
        )
        lo, hi = block * BLOCK_N, tl.minimum(block * BLOCK_N + BLOCK_N, tk)
        first, last = 0, tl.max(tl.where((begin < hi) & (stop > lo), tq, 0), 0)
        whole = tl.max(tl.where((begin > lo) | (stop < hi), last, 0), 0)
    a = first + tl.cdiv(whole - first, BLOCK_M) * BLOCK_M
    b = a + tl.maximum(last - a, 0) // BLOCK_M * BLOCK_M
    begins, ends = (a, first), (b, last - (b - a))
    K += batch * stride_kb + key_head * stride_kh
    V += batch * stride_vb + key_head * stride_vh
    k = signed(tile(K, cols, stride_kt, tk, width, True, EVEN_D, STEP, BLOCK_D), scale)
    v = tile(V, cols, stride_vt, tk, value_width, True, EVEN_V, STEP, BLOCK_V)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        q_head = Q + batch * stride_qb + head * stride_qh
        dout_head = DOUT + batch * stride_db + head * stride_dh
        row_head = (batch * heads + head) * tq
        table = TABLE
        if TABLE is not None:
            table = TABLE + head * (2 * grid_rows - 1) * (2 * grid_cols - 1)
        delta_head = DELTA
        if DELTA is not None:
            delta_head = DELTA + row_head
        for part in tl.static_range(2):
            dk, dv = key_grads(
                dk, dv, k, v, cols, begins[part], ends[part], a, b - a,
                q_head, dout_head, LSE + row_head, delta_head, START, END, batch, table,
                stride_qt, stride_dt, stride_sb, stride_st, stride_eb, stride_et,
                tq, tk, width, value_width, grid_rows, grid_cols, factor, DK is not None, DV is not None,
                part == 1, EVEN_D, EVEN_V, STEP, BLOCK_M, BLOCK_D, BLOCK_V, LOG_E, PRECISION,
            )  # fmt: skip
    if DK is not None:
        DK += batch * stride_gb + key_head * stride_gh
        put(DK, dk * scale, cols, stride_gt, tk, width, STEP, BLOCK_D)
    if DV is not None:
        DV += batch * stride_wb + key_head * stride_wh
        put(DV, dv, cols, stride_wt, tk, value_width, STEP, BLOCK_V)


QUERY_GRADS: Tiles = {
    (True, 64): Tile(64, 32, 4, 2),
    (True, 128): Tile(64, 32, 4, 2),
    (True, 256): Tile(32, 32, 4, 2),
    (False, 64): Tile(32, 32, 4, 2),
    (False, 128): Tile(16, 32, 4, 1),
}
QUERY_GRADS_ON: Exceptions = {
    **{on: {(True, 128, False): Tile(128, 32, 8, 2)} for on in ("sm_80", "sm_86", "sm_89")},
    "sm_90": {(True, 64, False): Tile(128, 32, 8, 2)},
    "sm_120": {
        (False, 64, True): Tile(32, 32, 4, 1),
        **{(False, 128, biased): Tile(16, 16, 4, 2) for biased in (False, True)},
    },
    "gfx942": {(True, 256, False): Tile(32, 32, 8, 2)},
}
KEY_GRADS: Tiles = {
    (True, 64): Tile(32, 128, 8, 2),
    (True, 128): Tile(32, 64, 8, 2),
    (True, 256): Tile(32, 32, 4, 1),
    (False, 64): Tile(32, 32, 8, 2),
    (False, 128): Tile(32, 16, 8, 1),
}
KEY_GRADS_ON: Exceptions = {
    "sm_90": {(True, 64, False): Tile(64, 128, 8, 2), (True, 128, False): Tile(16, 128, 8, 2)},
    "sm_100": {(True, 128, False): Tile(32, 64, 8, 1)},
    "sm_120": {(True, 64, True): Tile(32, 64, 8, 2)},
    "gfx942": {(True, 256, False): Tile(16, 32, 8, 1)},
}
KEY_GRADS_STEPPED_ON: Exceptions = {}  # of these, where rows are read 16 bytes at a time
if PIPELINES_NUMBERS:  # such as lse and delta
    KEY_GRADS_ON |= {
        **{on: {(True, 64, True): Tile(32, 128, 8, 1)} for on in ("sm_80", "sm_86", "sm_89")},
        "sm_90": {(True, 64, False): Tile(32, 128, 8, 1), (True, 128, False): Tile(16, 128, 8, 1)},
    }
    four_warps = {(True, 64, False): Tile(32, 128, 4, 1)}
    KEY_GRADS_STEPPED_ON |= {"sm_90": KEY_GRADS_ON["sm_90"] | four_warps}


def row_delta(
    dout: Tensor,  # [B, H, Tq, Dv]
    out: Tensor,  # [B, H, Tq, Dv]
    dlse: Tensor | None,  # [B, H, Tq]
) -> Tensor:  # [B, H, Tq] float32
    """<dout, out> - dlse, where `query_gradient` does not give it."""
    b, h, tq, width = out.shape
    delta = out.new_empty((b, h, tq), dtype=torch.float32)
    block_v = block(width)
    block_m = max(1, 4096 // block_v)
    if delta.numel():
        with torch.cuda.device_of(out):
            _row_sums[(cdiv(tq, block_m) * h * b,)](
                dout, out, dlse, delta, *dout.stride()[:3], *out.stride()[:3], h, tq, width,
                block_m, block_v, width == block_v, step(dout, out), num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return delta


def query_gradient(
    dout: Tensor,  # [B, H, Tq, Dv]
    dlse: Tensor | None,  # [B, H, Tq]
    query: Tensor,  # [B, H, Tq, Dh]
    source: Source,
    second: Source | None,
    out: Tensor,  # [B, H, Tq, Dv]
    lse: Tensor,  # [B, H, Tq]
    scale: float,
    table: Tensor | None = None,  # [H, 2R-1, 2C-1]
    grid_rows: int = 0,
    grid_cols: int = 0,
) -> tuple[Tensor, Tensor]:  # [B, H, Tq, Dh], [B, H, Tq] float32
    """dquery and, for the other gradients, <dout, out> - dlse."""
    b, h, tq, width = query.shape
    tk, value_width = source.value.shape[2:]
    tk2 = second.key.shape[2] if second else 0
    dq, delta = empty_heads_merged(query, query.shape), lse.new_empty(lse.shape)
    if lse.numel() == 0:
        return dq, delta
    options = launch_options(
        QUERY_GRADS, query, source.value, tq, max(tk, tk2), table is not None, QUERY_GRADS_ON
    )
    tensors = (query, *source[:2], *(second[:2] if second else ()), dout, out, dq)
    with torch.cuda.device_of(query):
        _query_grads[(cdiv(tq, options["BLOCK_M"]) * h * b,)](
            query, source.key, source.value, *((second.key, second.value) if second else (None, None)),
            source.start, source.end, table, dout, out, lse, dlse, delta, dq,
            *query.stride()[:3], *source.strides(), *(second.strides() if second else [0] * 6),
            *dout.stride()[:3], *out.stride()[:3], *dq.stride()[:3], *source.interval_strides(), h,
            h // source.key.shape[1], tq, tk, tk2, width, value_width, grid_rows, grid_cols,
            scale, factor(scale, options["LOG_E"]), STEP=step(*tensors), **options,
        )  # fmt: skip
    return dq, delta


def key_gradients(
    dout: Tensor,  # [B, H, Tq, Dv]
    query: Tensor,  # [B, H, Tq, Dh]
    source: Source,
    lse: Tensor,  # [B, H, Tq]
    delta: Tensor | None,  # [B, H, Tq], not needed for the values' gradient
    scale: float,
    needs: list[bool],
    table: Tensor | None = None,  # [H, 2R-1, 2C-1]
    grid_rows: int = 0,
    grid_cols: int = 0,
) -> tuple[Tensor, Tensor]:
    """dkey [B, Hkv, Tk, Dh] and dvalue [B, Hkv, Tk, Dv]; one that is not needed has size 0."""
    key, value, start, end = source
    dk = empty_heads_merged(key, key.shape) if needs[0] else key.new_empty(0)
    dv = empty_heads_merged(value, value.shape) if needs[1] else value.new_empty(0)
    if dk.numel() == dv.numel() == 0:
        return dk, dv
    b, h, tq, width = query.shape
    hkv, tk, value_width = value.shape[1:]
    tensors = (query, key, value, dout, *(x for x in (dk, dv) if x.numel()))
    elements = step(*tensors)
    exceptions = KEY_GRADS_ON | (KEY_GRADS_STEPPED_ON if elements > 1 else {})
    options = launch_options(KEY_GRADS, query, value, tq, tk, table is not None, exceptions)
    blocks, ranges, stride_rb = cdiv(tk, options["BLOCK_N"]), None, 0
    with torch.cuda.device_of(query):
        if any(bound is not None and bound.stride(1) for bound in (start, end)):
            shared = all(bound is None or bound.stride(0) == 0 for bound in (start, end))
            ranges = lse.new_empty((1 if shared else b, blocks, 3), dtype=torch.int32)
            stride_rb = 0 if shared else 3 * blocks
            _query_ranges[(len(ranges) * blocks,)](
                start, end, ranges, *source.interval_strides(), tq, tk, options["BLOCK_N"],
                min(RANGE_ROWS, block(tq)), num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        _key_grads[(blocks * hkv * b,)](
            query, key, value, start, end, table, ranges, dout, lse, delta,
            dk if dk.numel() else None, dv if dv.numel() else None,
            *query.stride()[:3], *source.strides(), *dout.stride()[:3],
            *(dk.stride()[:3] if dk.numel() else (0, 0, 0)), *(dv.stride()[:3] if dv.numel() else (0, 0, 0)),
            *source.interval_strides(), stride_rb, h, h // hkv, tq, tk, width, value_width,
            grid_rows, grid_cols, scale, factor(scale, options["LOG_E"]), STEP=elements, **options,
        )  # fmt: skip
    return dk, dv
