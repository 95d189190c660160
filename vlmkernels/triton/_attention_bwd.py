"""Gradients of the attention kernels: one kernel over queries, one over keys and values, without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference._attention import empty_heads_merged
from vlmkernels.triton._attention import (
    Exceptions,
    Source,
    Tile,
    Tiles,
    block,
    grid_bias,
    intervals,
    key_bounds,
    launch_options,
    tile,
)

RANGE_ROWS = 1024  # queries that a program of _query_ranges reads at once


@triton.jit
def _row_sums(
    DOUT,  # [B, heads, tq, value_width]
    OUT,  # [B, heads, tq, value_width]
    DLSE,  # [B, heads, tq] or None
    DELTA,  # [B, heads, tq] float32: <dout, out> - dlse
    stride_db, stride_dh, stride_dt, stride_ob, stride_oh, stride_ot, heads, tq, value_width,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tq, BLOCK_M)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    DOUT += batch * stride_db + head * stride_dh
    OUT += batch * stride_ob + head * stride_oh
    dout = tile(DOUT, rows, stride_dt, tq, value_width, True, EVEN_V, BLOCK_V).to(tl.float32)
    out = tile(OUT, rows, stride_ot, tq, value_width, True, EVEN_V, BLOCK_V).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    at = (batch * heads + head) * tq + rows
    if DLSE is not None:
        delta -= tl.load(DLSE + at, mask=rows < tq, other=0.0)
    tl.store(DELTA + at, delta, mask=rows < tq)


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
    stride_k, stride_v, tk, width, value_width, grid_rows, grid_cols, scale,
    MASKED: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Continues dq / scale over blocks of keys from lo to hi."""
    for first in range(lo, hi, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        k = tile(K, cols, stride_k, tk, width, MASKED, EVEN_D, BLOCK_D)
        v = tile(V, cols, stride_v, tk, value_width, MASKED, EVEN_V, BLOCK_V)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if TABLE is not None:
            s += grid_bias(TABLE, rows[:, None], cols[None, :], grid_rows, grid_cols)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp(s - lse[:, None]) * (dp - delta[:, None])
        if MASKED:
            seen = (cols[None, :] >= start[:, None]) & (cols[None, :] < end[:, None])
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _query_grads(
    Q, K, V, K2, V2, START, END, TABLE,  # as in _forward
    DOUT,  # [B, heads, tq, value_width]
    LSE,  # [B, heads, tq] float32
    DELTA,  # [B, heads, tq] float32
    DQ,  # [B, heads, tq, width]
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_k2b, stride_k2h, stride_k2t, stride_v2b, stride_v2h, stride_v2t, stride_db, stride_dh, stride_dt,
    stride_gb, stride_gh, stride_gt, stride_sb, stride_st, stride_eb, stride_et,
    heads, group, tq, tk, tk2, width, value_width, grid_rows, grid_cols, scale,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tq, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tq
    start, end = intervals(START, END, batch, rows, stride_sb, stride_st, stride_eb, stride_et, tq, tk)
    lo, a, b, hi = key_bounds(start, end, inside, tk, BLOCK_N)
    q = tile(Q + batch * stride_qb + head * stride_qh, rows, stride_qt, tq, width, True, EVEN_D, BLOCK_D)
    DOUT += batch * stride_db + head * stride_dh
    dout = tile(DOUT, rows, stride_dt, tq, value_width, True, EVEN_V, BLOCK_V)
    at = (batch * heads + head) * tq + rows
    lse = tl.load(LSE + at, mask=inside, other=0.0)
    delta = tl.load(DELTA + at, mask=inside, other=0.0)
    K += batch * stride_kb + head // group * stride_kh
    V += batch * stride_vb + head // group * stride_vh
    if TABLE is not None:
        TABLE += head * (2 * grid_rows - 1) * (2 * grid_cols - 1)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begins, ends = (lo, a, b), (tl.minimum(a, hi), b, hi)
    for part in tl.static_range(3):
        dq = query_grads(
            dq, q, dout, lse, delta, rows, start, end, begins[part], ends[part], K, V, TABLE, stride_kt,
            stride_vt, tk, width, value_width, grid_rows, grid_cols, scale, part != 1, EVEN_D, EVEN_V,
            BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    if K2 is not None:
        K2 += batch * stride_k2b + head // group * stride_k2h
        V2 += batch * stride_v2b + head // group * stride_v2h
        start, end = intervals(None, None, batch, rows, 0, 0, 0, 0, tq, tk2)
        dq = query_grads(
            dq, q, dout, lse, delta, rows, start, end, 0, tk2, K2, V2, None, stride_k2t, stride_v2t, tk2,
            width, value_width, grid_rows, grid_cols, scale, True, EVEN_D, EVEN_V, BLOCK_N, BLOCK_D,
            BLOCK_V, PRECISION,
        )  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    at = batch * stride_gb + head * stride_gh + rows.to(tl.int64)[:, None] * stride_gt + cols[None, :]
    kept = inside[:, None] & (cols < width)[None, :]
    tl.store(DQ + at, (dq * scale).to(DQ.dtype.element_ty), mask=kept)


@triton.jit
def _query_ranges(
    START, END,  # as in _forward
    RANGES,  # [programs / key blocks, key blocks, 2] int32: the range of the queries that see a block
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
    tl.store(RANGES + 2 * tl.program_id(0), tl.min(first, 0))
    tl.store(RANGES + 2 * tl.program_id(0) + 1, tl.max(last, 0))


@triton.jit
def _key_grads(
    Q, K, V, START, END, TABLE,  # as in _forward
    RANGES,  # [B or 1, key blocks, 2] int32, or None where every query sees every key
    DOUT,  # [B, heads, tq, value_width]
    LSE,  # [B, heads, tq] float32
    DELTA,  # [B, heads, tq] float32 or None without DK
    DK,  # [B, heads / group, tk, width] or None
    DV,  # [B, heads / group, tk, value_width] or None
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_gb, stride_gh, stride_gt, stride_wb, stride_wh, stride_wt,
    stride_sb, stride_st, stride_eb, stride_et, stride_rb,
    heads, group, tq, tk, width, value_width, grid_rows, grid_cols, scale,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tk, BLOCK_N)
    block = tl.program_id(0) % blocks
    key_head = (tl.program_id(0) // blocks % (heads // group)).to(tl.int64)
    batch = (tl.program_id(0) // blocks // (heads // group)).to(tl.int64)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < tk
    first, last = 0, tq
    if RANGES is not None:
        at = RANGES + batch * stride_rb + 2 * block
        first, last = tl.load(at), tl.load(at + 1)
    K += batch * stride_kb + key_head * stride_kh
    k = tile(K, cols, stride_kt, tk, width, True, EVEN_D, BLOCK_D)
    if DK is not None:
        V += batch * stride_vb + key_head * stride_vh
        v = tile(V, cols, stride_vt, tk, value_width, True, EVEN_V, BLOCK_V)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if DV is not None:
        dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        q_head = Q + batch * stride_qb + head * stride_qh
        dout_head = DOUT + batch * stride_db + head * stride_dh
        row_head = (batch * heads + head) * tq
        for before in range(first, last, BLOCK_M):
            rows = before + tl.arange(0, BLOCK_M)
            start, end = intervals(
                START, END, batch, rows, stride_sb, stride_st, stride_eb, stride_et, tq, tk
            )
            q = tile(q_head, rows, stride_qt, tq, width, True, EVEN_D, BLOCK_D)
            dout = tile(dout_head, rows, stride_dt, tq, value_width, True, EVEN_V, BLOCK_V)
            lse = tl.load(LSE + row_head + rows, mask=rows < tq, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            if TABLE is not None:
                table = TABLE + head * (2 * grid_rows - 1) * (2 * grid_cols - 1)
                s += grid_bias(table, rows[None, :], cols[:, None], grid_rows, grid_cols)
            seen = (cols[:, None] >= start[None, :]) & (cols[:, None] < end[None, :])
            p = tl.where(seen, tl.exp(s - lse[None, :]), 0.0)
            if DV is not None:
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            if DK is not None:
                delta = tl.load(DELTA + row_head + rows, mask=rows < tq, other=0.0)
                ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if DK is not None:
        at_d = tl.arange(0, BLOCK_D)
        at = batch * stride_gb + key_head * stride_gh + cols.to(tl.int64)[:, None] * stride_gt
        kept = inside[:, None] & (at_d < width)[None, :]
        tl.store(DK + at + at_d[None, :], (dk * scale).to(DK.dtype.element_ty), mask=kept)
    if DV is not None:
        at_v = tl.arange(0, BLOCK_V)
        at = batch * stride_wb + key_head * stride_wh + cols.to(tl.int64)[:, None] * stride_wt
        kept = inside[:, None] & (at_v < value_width)[None, :]
        tl.store(DV + at + at_v[None, :], dv.to(DV.dtype.element_ty), mask=kept)


QUERY_GRADS: Tiles = {
    (True, 64): Tile(64, 32, 4, 2),
    (True, 128): Tile(64, 32, 4, 2),
    (True, 256): Tile(32, 32, 4, 2),
    (False, 64): Tile(32, 32, 4, 2),
    (False, 128): Tile(16, 32, 4, 1),
}
QUERY_GRADS_ON: Exceptions = {
    **{on: {(True, 128, False): Tile(128, 32, 8, 2)} for on in ("sm_80", "sm_86", "sm_89")},
    "sm_120": {(False, 128, False): Tile(16, 16, 4, 2), (False, 128, True): Tile(16, 16, 4, 2)},
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
    "sm_100": {(True, 128, False): Tile(32, 64, 8, 1)},
    "sm_120": {(True, 64, True): Tile(32, 64, 8, 2)},
    "gfx942": {(True, 256, False): Tile(16, 32, 8, 1)},
}


def row_sums(
    dout: Tensor,  # [B, H, Tq, Dv]
    out: Tensor,  # [B, H, Tq, Dv]
    dlse: Tensor | None,  # [B, H, Tq]
) -> Tensor:  # [B, H, Tq] float32
    """<dout, out> - dlse."""
    b, h, tq, width = out.shape
    delta = out.new_empty((b, h, tq), dtype=torch.float32)
    block_v = block(width)
    block_m = max(1, 4096 // block_v)
    if delta.numel():
        with torch.cuda.device_of(out):
            _row_sums[(triton.cdiv(tq, block_m) * h * b,)](
                dout, out, dlse.contiguous() if dlse is not None else None, delta, *dout.stride()[:3],
                *out.stride()[:3], h, tq, width, block_m, block_v, width == block_v, num_warps=4,
                enable_fp_fusion=False,  # fused with the sum over lanes, a product differs from lane to lane
            )  # fmt: skip
    return delta


def query_gradient(
    dout: Tensor,  # [B, H, Tq, Dv]
    query: Tensor,  # [B, H, Tq, Dh]
    source: Source,
    second: Source | None,
    lse: Tensor,  # [B, H, Tq]
    delta: Tensor | None,  # [B, H, Tq]
    scale: float,
    table: Tensor | None = None,  # [H, 2R-1, 2C-1]
    grid_rows: int = 0,
    grid_cols: int = 0,
) -> Tensor:  # [B, H, Tq, Dh]
    dq = empty_heads_merged(query, query.shape)
    if dq.numel() == 0:
        return dq
    b, h, tq, width = query.shape
    tk, value_width = source.value.shape[2:]
    tk2 = second.key.shape[2] if second else 0
    options = launch_options(
        QUERY_GRADS, query, source.value, tq, max(tk, tk2), table is not None, QUERY_GRADS_ON
    )
    with torch.cuda.device_of(query):
        _query_grads[(triton.cdiv(tq, options["BLOCK_M"]) * h * b,)](
            query, source.key, source.value, *((second.key, second.value) if second else (None, None)),
            source.start, source.end, table, dout, lse, delta, dq,
            *query.stride()[:3], *source.strides(), *(second.strides() if second else [0] * 6),
            *dout.stride()[:3], *dq.stride()[:3], *source.interval_strides(), h, h // source.key.shape[1],
            tq, tk, tk2, width, value_width, grid_rows, grid_cols,
            scale, **options,
        )  # fmt: skip
    return dq


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
    options = launch_options(KEY_GRADS, query, value, tq, tk, table is not None, KEY_GRADS_ON)
    blocks, ranges, stride_rb = triton.cdiv(tk, options["BLOCK_N"]), None, 0
    with torch.cuda.device_of(query):
        if start is not None or end is not None:
            shared = all(bound is None or bound.stride(0) == 0 for bound in (start, end))
            ranges = lse.new_empty((1 if shared else b, blocks, 2), dtype=torch.int32)
            stride_rb = 0 if shared else 2 * blocks
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
            grid_rows, grid_cols, scale, **options,
        )  # fmt: skip
    return dk, dv
