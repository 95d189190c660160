"""flash-attn's functions on the CPU, with the names, places and defaults of its releases' arguments.

They compute with the reference, write what the segments have and nothing else, and return plus infinity (2)
or minus infinity (3) for a query without keys, as the kernels do. Those of 2 are of 2.7 and later.
"""

import types

import torch
from torch import Tensor

from vlmkernels.reference.interval_attention import interval_attention_bwd, interval_attention_fwd

FLASH2, FLASH3 = "flash_attn.flash_attn_interface", "flash_attn_interface"


def bounds(queries: int, keys: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Aligned at the last query and the last key."""
    end = torch.arange(keys - queries + 1, keys + 1) if causal else torch.full((queries,), keys)
    return torch.zeros_like(end), end


def segments(ends_q: Tensor | None, ends_k: Tensor | None, longest_q, longest_k, q: Tensor, k: Tensor):
    """Of each segment its place among the queries, and among the keys."""
    for ends, longest, x in ((ends_q, longest_q, q), (ends_k, longest_k, k)):
        assert (ends.dtype, ends.dim()) == (torch.int32, 1)
        assert ends.is_contiguous()
        assert ends.diff().min() >= 0
        assert ends[0] >= 0
        assert ends[-1] <= x.shape[0]
        assert ends.diff().max() <= longest
    for at in range(len(ends_q) - 1):
        yield tuple(slice(int(ends[at]), int(ends[at + 1])) for ends in (ends_q, ends_k))


def check(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] <= 256
        assert x.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in x.stride()[:-1])


def forward(q, k, v, scale, causal, ends=None, longest=None, nothing=torch.inf):
    """[B, T, H, D] of each, or [tokens, H, D] with segments."""
    check(q, k, v)
    if ends is None:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        seen = bounds(q.shape[1], k.shape[1], causal)
        out, lse = interval_attention_fwd(*heads_first, *seen, scale, None, 0, 0)
        return out.transpose(1, 2), lse.where(lse > -torch.inf, nothing)
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    for rows, cols in segments(*ends, *longest, q, k):
        part = forward(q[None, rows], k[None, cols], v[None, cols], scale, causal, nothing=nothing)
        out[rows], lse[:, rows] = part[0][0], part[1][0]
    return out, lse


def backward(dout, q, k, v, out, lse, dq, dk, dv, scale, causal, ends=None, longest=None):
    check(dout, q, k, v, out)
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    if ends is None:
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        heads_first = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        seen = bounds(q.shape[1], k.shape[1], causal)
        grads = interval_attention_bwd(
            heads_first[0], None, *heads_first[1:4], *seen, heads_first[4], lse, scale, None, 0, 0,
            [True, True, True, False],
        )  # fmt: skip
        for into, grad in zip((dq, dk, dv), grads, strict=False):
            into.copy_(grad.transpose(1, 2))
        return
    assert lse.shape == (q.shape[1], q.shape[0])
    for x in (dq, dk, dv):
        x.fill_(torch.nan)
    for rows, cols in segments(*ends, *longest, q, k):
        parts = dout[None, rows], q[None, rows], k[None, cols], v[None, cols], out[None, rows]
        grads = dq[None, rows], dk[None, cols], dv[None, cols]
        backward(*parts, lse[None, :, rows].contiguous(), *grads, scale, causal)


def flash2(calls: list[str]) -> types.ModuleType:
    module = types.ModuleType(FLASH2)

    def plain(window_left, window_right, softcap, alibi_slopes, dropout_p):
        assert (window_left, window_right, softcap, alibi_slopes, dropout_p) == (-1, -1, 0.0, None, 0.0)

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        plain(window_size_left, window_size_right, softcap, alibi_slopes, dropout_p)
        calls.append("flash2")
        out, lse = forward(q, k, v, softmax_scale, causal)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        plain(window_size_left, window_size_right, softcap, alibi_slopes, dropout_p)
        calls.append("flash2 segments")
        ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        out, lse = forward(q, k, v, softmax_scale, causal, ends, longest)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        plain(window_size_left, window_size_right, softcap, alibi_slopes, dropout_p)
        assert deterministic
        calls.append("flash2 backward")
        backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        plain(window_size_left, window_size_right, softcap, alibi_slopes, dropout_p)
        assert deterministic
        calls.append("flash2 segments backward")
        ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, ends, longest)

    for function in (
        _flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward,
    ):  # fmt: skip
        setattr(module, function.__name__, function)
    return module


def flash3(calls: list[str], *, older: bool = False) -> types.ModuleType:
    """Of two releases, which differ in the names and places of what comes after `causal`."""
    module = types.ModuleType(FLASH3)

    def run_forward(q, k, v, unused, ends, longest, scale, causal):
        assert unused == [None] * len(unused)
        calls.append("flash3" if ends[0] is None else "flash3 segments")
        segments = () if ends[0] is None else (ends, longest)
        out, lse = forward(q, k, v, scale, causal, *segments, nothing=-torch.inf)
        return out, lse, torch.empty(0), torch.empty(0)

    def run_backward(*tensors, ends, longest, scale, causal, deterministic):
        assert deterministic
        calls.append("flash3 backward" if ends[0] is None else "flash3 segments backward")
        backward(*tensors, scale, causal, *(() if ends[0] is None else (ends, longest)))

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None,
        seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        unused = [
            k_new, v_new, qv, out_, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx,
            leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale,
        ]  # fmt: skip
        ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return run_forward(q, k, v, unused, ends, longest, softmax_scale, causal)

    def _older_flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin,
        seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1),
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1,
        pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        unused = [
            k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx,
            leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale,
        ]  # fmt: skip
        ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return run_forward(q, k, v, unused, ends, longest, softmax_scale, causal)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert sequed_q is sequed_k is None
        run_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, ends=(cu_seqlens_q, cu_seqlens_k),
            longest=(max_seqlen_q, max_seqlen_k), scale=softmax_scale, causal=is_causal,
            deterministic=deterministic,
        )  # fmt: skip

    def _older_flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
        max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0,
        deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert sequed_q is sequed_k is None
        run_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, ends=(cu_seqlens_q, cu_seqlens_k),
            longest=(max_seqlen_q, max_seqlen_k), scale=softmax_scale, causal=causal,
            deterministic=deterministic,
        )  # fmt: skip

    module._flash_attn_forward = _older_flash_attn_forward if older else _flash_attn_forward
    module._flash_attn_backward = _older_flash_attn_backward if older else _flash_attn_backward
    return module
