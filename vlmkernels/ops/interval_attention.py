"""out_i = sum_j p_ij v_j, p_i = softmax of scale <q_i, k_j> + bias_ij over start_i <= j < end_i."""

from typing import Literal, overload

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels import _providers as providers
from vlmkernels._library import TRITON, define, empty_grads, kernel
from vlmkernels.intervals import Bounds
from vlmkernels.ops import _attention as attention
from vlmkernels.reference._attention import empty_heads_merged
from vlmkernels.reference.interval_attention import interval_attention_bwd, interval_attention_fwd


@overload
def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Bounds | Tensor,
    end: Tensor | None = ...,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    relative_bias: Tensor | None = ...,
    grid: tuple[int, int] | None = ...,
) -> Tensor: ...
@overload
def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Bounds | Tensor,
    end: Tensor | None = ...,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    relative_bias: Tensor | None = ...,
    grid: tuple[int, int] | None = ...,
) -> tuple[Tensor, Tensor]: ...
@arguments.public
def interval_attention(
    query: Tensor,  # [B, H, Tq, Dh]
    key: Tensor,  # [B, Hkv, Tk, Dh]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    start: Bounds | Tensor,  # [Tq] or [B, Tq], or both start and end
    end: Tensor | None = None,  # as start
    *,
    scale: float | None = None,
    return_lse: bool = False,
    relative_bias: Tensor | None = None,  # [H, 2R-1, 2C-1]
    grid: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which query i sees the keys ``start_i <= j < end_i``.

    Causal, prefix-LM, packed, padded and Flamingo's masks are such intervals (`vlmkernels.intervals`). Blocks
    of keys outside the intervals of a block of queries are skipped, and nothing of size Tq x Tk exists.
    Scaled dot-product attention is equation 1 of Vaswani et al. 2017, the streaming softmax that of
    FlashAttention (Dao et al. 2022).

    Args:
        query: ``[B, H, Tq, Dh]``, any strides; a view of ``[B, Tq, H * Dh]`` need not be copied.
        key: ``[B, Hkv, Tk, Dh]``, H a multiple of Hkv: query head h reads key head ``h // (H // Hkv)``.
        value: ``[B, Hkv, Tk, Dv]``.
        start, end: int32 or int64, ``[Tq]`` or ``[B, Tq]``; clipped to [0, Tk]; ``end <= start`` is an empty
            row. Not read on the host if they are on an accelerator. They need not be monotone. In place of
            both, what a builder of `vlmkernels.intervals` returned: on CUDA, masks that other libraries know
            may be computed by those (docs/interval_attention.md).
        scale: of the similarities, ``1 / sqrt(Dh)`` when None.
        return_lse: also return the log-sum-exp of each row's logits.
        relative_bias: ``[H, 2R-1, 2C-1]``, added to the logits as ``relative_bias[h, r_i - r_j + R - 1,
            c_i - c_j + C - 1]`` for queries and keys i, j < R C at row r and column c of a row-major grid.
        grid: ``(R, C)``.

    Returns:
        ``[B, H, Tq, Dv]`` in the dtype of the inputs, in memory ``[B, Tq, H, Dv]``, so that merging the heads
        copies nothing; an empty row is exactly 0 and gets no gradient. With ``return_lse`` also ``[B, H,
        Tq]``, float32 (float64), natural logarithm, -inf on empty rows, with a gradient. Softmax and sums
        run in that dtype.

    Raises:
        ValueError: naming every invalid argument.
    """
    faults = attention.attention_faults(query, {"key": key}, {"value": value})
    bounds, wrong = attention.bounds_of(start, end)
    faults += wrong or attention.interval_faults(query, *bounds)
    faults += attention.bias_faults(query, relative_bias, grid)
    if faults:
        raise ValueError("interval_attention: " + "; ".join(faults))
    rows, cols = grid if grid is not None and relative_bias is not None else (0, 0)
    scale = attention.scale_of(scale, query)
    known = attention.known_mask(start, query, key)
    out, lse = _op(query, key, value, *bounds, scale, relative_bias, rows, cols, *known)
    return (out, lse) if return_lse else out


def _fake(query, key, value, *_):
    b, h, tq, _ = query.shape
    lse = query.new_empty((b, h, tq), dtype=torch.promote_types(query.dtype, torch.float32))
    return empty_heads_merged(query, (b, h, tq, value.shape[-1])), lse


def _fake_bwd(dout, dlse, query, key, value, start, end, out, lse, scale, relative_bias, *options):
    needs = options[-1]
    bias = query if relative_bias is None else relative_bias
    return *attention.empty_grads((query, key, value), needs[:3]), *empty_grads((bias,), needs[3:])


def _flops(query, key, value, *_, **__):
    return attention.flops(query, key[2], value[3])


def _flops_bwd(dout, dlse, query, key, value, *rest, **_):
    need_query, need_key, need_value, need_bias = rest[-1]
    return attention.flops_bwd(
        query, key[2], value[3], need_query=need_query, need_key=need_key, need_value=need_value,
        need_logits=need_query or need_key or need_bias,
    )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, start, end, ctx.scale, relative_bias, ctx.rows, ctx.cols, ctx.causal, *ends = inputs
    ctx.save_for_backward(query, key, value, start, end, *output, relative_bias, *ends)
    ctx.set_materialize_grads(False)


def _backward(ctx, needs, dout, dlse):
    *tensors, relative_bias, query_ends, key_ends = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[5])
    names = ("query", "key", "value", "relative_bias")
    wanted = [needs[name] for name in names]
    options = relative_bias, ctx.rows, ctx.cols, ctx.causal, query_ends, key_ends
    grads = _bwd(dout, dlse, *tensors, ctx.scale, *options, wanted)
    return dict(zip(names, grads, strict=True))


def _by_bounds(kernel):
    """Of a kernel that reads nothing else of the mask."""
    return lambda *args: kernel(*args[:9])


def _by_bounds_bwd(kernel):
    return lambda *args: kernel(*args[:13], args[-1])


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor start, Tensor end"
_OPTIONS = (
    "float scale, Tensor? relative_bias, SymInt grid_rows, SymInt grid_cols,"
    " bool? causal, Tensor? query_ends, Tensor? key_ends"  # KnownMask
)
_op = define(
    f"interval_attention({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    reference=_by_bounds(interval_attention_fwd),
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("query", "key", "value"),
)
_bwd = define(
    f"interval_attention_bwd(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS},"
    " bool[4] needs) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor drelative_bias)",
    reference=_by_bounds_bwd(interval_attention_bwd),
    fake=_fake_bwd,
    flops=_flops_bwd,
)

if TRITON:
    from vlmkernels.triton import interval_attention as _triton

    def _on_cuda(*args):
        query, key, value, _, _, scale, relative_bias, _, _, *known = args
        given = providers.attention(providers.call_of(query, key, value, scale, relative_bias, *known))
        return _triton.interval_attention(*args[:9]) if given is None else given

    def _on_cuda_bwd(*args):
        dout, dlse, query, key, value, _, _, out, lse, scale, relative_bias, _, _, *known, needs = args
        if dlse is None and all(needs[:3]):
            call = providers.call_of(query, key, value, scale, relative_bias, *known)
            grads = providers.attention_bwd(call, dout, out, lse)
            if grads is not None:
                return *grads, query.new_empty(0)
        return _triton.interval_attention_bwd(*args[:13], needs)

    kernel("interval_attention", "CUDA", _on_cuda, "Triton")
    kernel("interval_attention_bwd", "CUDA", _on_cuda_bwd, "Triton")
