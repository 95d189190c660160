"""interval_attention (contract in ops/interval_attention.py): launches of the attention kernels.

The gradient of the relative bias has a separate kernel: a program owns all pairs of rows, and of blocks of
columns, of the grid with the same offset, so that its tiles add up element by element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.interval_attention import interval_attention_bwd as reference_bwd
from vlmkernels.reference.interval_attention import interval_attention_fwd as reference_fwd
from vlmkernels.triton import _attention as attention
from vlmkernels.triton import _attention_bwd as attention_bwd
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._attention import Source, grid_bias, intervals, step, tile
from vlmkernels.triton._tiles import rows_contiguous

BIAS_PROGRAMS = 1024  # the batch is split until there are about so many programs
ENTRIES = 32  # of the bias that a program adds up


@triton.jit
def _bias_grads(
    Q,  # [B, heads, tq, width]
    K,  # [B, heads / group, tk, width]
    V,  # [B, heads / group, tk, value_width]
    START,  # [B, tq]
    END,  # [B, tq]
    TABLE,  # [heads, 2 grid_rows - 1, 2 grid_cols - 1]
    DOUT,  # [B, heads, tq, value_width]
    LSE,  # [B, heads, tq] float32
    DELTA,  # [B, heads, tq] float32
    PARTS,  # [splits, heads, 2 grid_rows - 1, 2 col_blocks - 1, BLOCK, BLOCK] float32
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_sb, stride_st, stride_eb, stride_et,
    batches, splits, heads, group, tq, tk, width, value_width, grid_rows, grid_cols, scale,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(grid_cols, BLOCK)
    program = tl.program_id(0)
    across = program % (2 * col_blocks - 1) - (col_blocks - 1)
    program = program // (2 * col_blocks - 1)
    down = program % (2 * grid_rows - 1) - (grid_rows - 1)
    program = program // (2 * grid_rows - 1)
    head = (program % heads).to(tl.int64)
    Q += head * stride_qh
    DOUT += head * stride_dh
    K += head // group * stride_kh
    V += head // group * stride_vh
    TABLE += head * (2 * grid_rows - 1) * (2 * grid_cols - 1)
    within = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    split = program // heads
    for turn in range(0, tl.cdiv(batches - split, splits)):
        batch = split.to(tl.int64) + turn * splits
        row_head = (batch * heads + head) * tq
        for row in range(tl.maximum(down, 0), tl.minimum(grid_rows + down, grid_rows)):
            for col in range(tl.maximum(across, 0), tl.minimum(col_blocks + across, col_blocks)):
                i, j = col * BLOCK + within, (col - across) * BLOCK + within
                rows = tl.where(i < grid_cols, row * grid_cols + i, tq)
                cols = tl.where(j < grid_cols, (row - down) * grid_cols + j, tk)
                start, end = intervals(
                    START, END, batch, rows, stride_sb, stride_st, stride_eb, stride_et, tq, tk
                )
                q = tile(Q + batch * stride_qb, rows, stride_qt, tq, width, True, EVEN_D, STEP, BLOCK_D)
                k = tile(K + batch * stride_kb, cols, stride_kt, tk, width, True, EVEN_D, STEP, BLOCK_D)
                v = tile(V + batch * stride_vb, cols, stride_vt, tk, value_width, True, EVEN_V, STEP, BLOCK_V)
                dout = tile(
                    DOUT + batch * stride_db, rows, stride_dt, tq, value_width, True, EVEN_V, STEP, BLOCK_V
                )
                lse = tl.load(LSE + row_head + rows, mask=rows < tq, other=0.0)
                delta = tl.load(DELTA + row_head + rows, mask=rows < tq, other=0.0)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                s += grid_bias(TABLE, rows[:, None], cols[None, :], grid_rows, grid_cols)
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                ds = tl.exp(s - lse[:, None]) * (dp - delta[:, None])
                seen = (cols[None, :] >= start[:, None]) & (cols[None, :] < end[:, None])
                total += tl.where(seen, ds, 0.0)
    at = tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + within[:, None] * BLOCK + within[None, :]
    tl.store(PARTS + at, total)


@triton.jit
def _bias_sums(
    PARTS,  # [splits, heads, 2 grid_rows - 1, 2 col_blocks - 1, BLOCK, BLOCK] float32
    DTABLE,  # [heads, 2 grid_rows - 1, 2 grid_cols - 1]
    splits,
    lines,  # heads (2 grid_rows - 1)
    grid_cols,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Entries of a line: the sums of the diagonals of tiles, each of which lies in two neighbours."""
    width, col_blocks = 2 * grid_cols - 1, tl.cdiv(grid_cols, BLOCK)
    blocks = tl.cdiv(width, ENTRIES)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    entries = tl.program_id(0) % blocks * ENTRIES + tl.arange(0, ENTRIES)
    offset = entries + 1 - grid_cols + col_blocks * BLOCK  # from the tile before the first
    tile_of, shift = offset // BLOCK - 1, offset % BLOCK
    total = tl.zeros([ENTRIES], tl.float64)
    for split in range(0, splits):
        first = (split * lines + line) * (2 * col_blocks - 1)
        for j in range(0, BLOCK):
            i = j + shift
            at = tl.where(i < BLOCK, tile_of, tile_of + 1)
            inside = (entries < width) & (at >= 0) & (at < 2 * col_blocks - 1)
            part = tl.load(PARTS + ((first + at) * BLOCK + i % BLOCK) * BLOCK + j, mask=inside, other=0.0)
            total += part.to(tl.float64)
    tl.store(DTABLE + line * width + entries, total.to(DTABLE.dtype.element_ty), mask=entries < width)


def bias_options(query: Tensor, value: Tensor, grid_cols: int) -> dict:
    """Keyword arguments of a launch of _bias_grads."""
    options = attention.launch_options(attention_bwd.KEY_GRADS, query, value, 1, 1, True)
    half, width = query.dtype != torch.float32, max(options["BLOCK_D"], options["BLOCK_V"])
    narrow = width <= (128 if half else 64 if options["PRECISION"] == "tf32" else 0)
    side = min(32 if narrow else 16, attention.block(grid_cols))
    options = {name: x for name, x in options.items() if name not in ("BLOCK_M", "BLOCK_N", "LOG_E")}
    if options["PRECISION"] == "tf32x3" and width > 64:
        options["PRECISION"] = "ieee"  # three products of the small tile would spill
    return options | {"BLOCK": side, "num_warps": 4, "num_stages": 1}


def _bias_gradient(dout, query, source, lse, delta, scale, table, grid_rows, grid_cols) -> Tensor:
    b, h, tq, width = query.shape
    tk, value_width = source.value.shape[2:]
    if lse.numel() == 0:
        return torch.zeros_like(table)
    options = bias_options(query, source.value, grid_cols)
    side = options["BLOCK"]
    blocks = tiles.cdiv(grid_cols, side)
    offsets = h * (2 * grid_rows - 1) * (2 * blocks - 1)
    splits = min(b, tiles.cdiv(BIAS_PROGRAMS, offsets))
    dtable = table.new_empty(table.shape)
    parts = lse.new_empty((splits, h, 2 * grid_rows - 1, 2 * blocks - 1, side, side))
    with torch.cuda.device_of(query):
        _bias_grads[(splits * offsets,)](
            query, source.key, source.value, source.start, source.end, table, dout, lse, delta, parts,
            *query.stride()[:3], *source.strides(), *dout.stride()[:3], *source.interval_strides(),
            b, splits, h, h // source.key.shape[1], tq, tk, width, value_width, grid_rows, grid_cols,
            scale, STEP=step(query, *source[:2], dout), **options,
        )  # fmt: skip
        lines = h * (2 * grid_rows - 1)
        _bias_sums[(lines * tiles.cdiv(2 * grid_cols - 1, ENTRIES),)](
            parts, dtable, splits, lines, grid_cols, side, ENTRIES, num_warps=1, enable_fp_fusion=True
        )
    return dtable


def _source(query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor) -> Source:
    rows = (query.shape[0], query.shape[2])
    return Source(key, value, start.expand(rows), end.expand(rows)).rows_contiguous()


def interval_attention(
    query: Tensor,  # [B, H, Tq, Dh]
    key: Tensor,  # [B, Hkv, Tk, Dh]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    start: Tensor,  # [Tq] or [B, Tq]
    end: Tensor,
    scale: float,
    relative_bias: Tensor | None,  # [H, 2R-1, 2C-1]
    grid_rows: int,
    grid_cols: int,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Tq, Dv], lse [B, H, Tq])."""
    if attention.unsupported(query, value):
        return reference_fwd(query, key, value, start, end, scale, relative_bias, grid_rows, grid_cols)
    table = relative_bias.contiguous() if relative_bias is not None else None
    source = _source(query, key, value, start, end)
    return attention.forward(query, source, None, scale, table, grid_rows, grid_cols)


def interval_attention_bwd(
    dout: Tensor,  # [B, H, Tq, Dv]
    dlse: Tensor | None,  # [B, H, Tq]
    query: Tensor,  # [B, H, Tq, Dh]
    key: Tensor,  # [B, Hkv, Tk, Dh]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    start: Tensor,  # [Tq] or [B, Tq]
    end: Tensor,
    out: Tensor,  # [B, H, Tq, Dv]
    lse: Tensor,  # [B, H, Tq]
    scale: float,
    relative_bias: Tensor | None,  # [H, 2R-1, 2C-1]
    grid_rows: int,
    grid_cols: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and relative_bias; size 0 where not needed."""
    if attention.unsupported(query, value):
        return reference_bwd(
            dout, dlse, query, key, value, start, end, out, lse, scale, relative_bias, grid_rows, grid_cols,
            needs,
        )  # fmt: skip
    need_query, need_key, _, need_bias = needs
    table = relative_bias.contiguous() if relative_bias is not None else None
    grid = (table, grid_rows, grid_cols)
    source = _source(query, key, value, start, end)
    dout, query, out, lse = (*map(rows_contiguous, (dout, query, out)), lse.contiguous())
    dlse = dlse.contiguous() if dlse is not None else None
    dq, delta, dbias = query.new_empty(0), None, (query if table is None else table).new_empty(0)
    if need_query:
        dq, delta = attention_bwd.query_gradient(dout, dlse, query, source, None, out, lse, scale, *grid)
    elif need_key or need_bias:
        delta = attention_bwd.row_delta(dout, out, dlse)
    if need_bias:
        dbias = _bias_gradient(dout, query, source, lse, delta, scale, *grid)
    dk, dv = attention_bwd.key_gradients(dout, query, source, lse, delta, scale, needs[1:3], *grid)
    return dq, dk, dv, dbias
