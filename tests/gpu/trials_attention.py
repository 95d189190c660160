"""Trials of interval_attention and perceiver_attention."""

import torch

from vlmkernels.reference.interval_attention import interval_attention_bwd, interval_attention_fwd, visible
from vlmkernels.reference.perceiver_attention import perceiver_attention_bwd, perceiver_attention_fwd
from vlmkernels.triton import interval_attention as triton_interval
from vlmkernels.triton import perceiver_attention as triton_perceiver

from .trials import judge, widened

STATS = ("lse", "dbias")  # results of sums alone, which round no factor of their own


def heads_last(b, h, t, d, dtype, padding=3):
    """[B, H, T, D] as a view of [B, T, H, D] with padded rows, as projections give it."""
    return torch.full((b, t, h, d + padding), float("nan"), dtype=dtype).normal_()[..., :d].transpose(1, 2)


def problem(b, h, hkv, tq, tk, dh, dv, dtype, padding=3):
    """query, key, value"""
    shapes = ((h, tq, dh), (hkv, tk, dh), (hkv, tk, dv))
    return tuple(heads_last(b, *shape, dtype, padding) for shape in shapes)


def any_intervals(b, tq, tk, dtype=torch.int32):
    """start, end: some empty, some outside the keys."""
    start = torch.randint(-5, tk + 5, (b, tq), dtype=dtype)
    return start, start + torch.randint(-5, tk, (b, tq), dtype=dtype)


def judge_attention(names, got, low, exact, dtype, needs, tf32=False):
    """As good as the reference in float32; where factors of products are rounded there is a cap.

    Rows that see nothing have a log-sum-exp of minus infinity.
    """
    for name, value, lower, truth, need in zip(names, got, low, exact, needs, strict=True):
        if need:
            finite = truth > -float("inf")
            assert torch.equal(value > -float("inf"), finite), name
            value, lower, truth = (torch.where(finite, x, 0) for x in (value, lower.to(value.dtype), truth))
            assert value.dtype == (torch.float32 if name == "lse" else dtype) or name == "dbias", name
        strict = name in STATS or dtype == torch.float32
        cap = 2e-3 if tf32 else None if strict else 6e-3
        judge((name,), (value,), (lower,), (truth,), (need,), cap)


class Interval:
    """interval_attention and its backward."""

    def __init__(
        self,
        query,
        key,
        value,
        start,
        end,
        *,
        scale=None,
        bias=None,
        grid=(0, 0),
        dlse=True,
        needs=None,
        tf32=False,
    ):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.inputs, self.rest = (query, key, value, start, end), (scale, bias, *grid)
        self.needs = [True, True, True, bias is not None] if needs is None else needs
        self.dout = torch.randn(*query.shape[:3], value.shape[3]).to(query.dtype)
        self.dlse = torch.randn(query.shape[:3]) if dlse else None
        self.tf32 = tf32

    def launch(self):
        out, lse = triton_interval.interval_attention(*self.inputs, *self.rest)
        saved = (self.dout, self.dlse, *self.inputs, out, lse, *self.rest)
        return out, lse, *triton_interval.interval_attention_bwd(*saved, self.needs)

    def expected(self, work, kept=None):
        """Results and gradients; the latter from the result `kept`, whose rounding enters them."""
        dout, dlse, *inputs = widened((self.dout, self.dlse, *self.inputs), work)
        rest = widened(self.rest, work)
        out, lse = interval_attention_fwd(*inputs, *rest)
        kept = out if kept is None else kept.to(work)
        return out, lse, *interval_attention_bwd(dout, dlse, *inputs, kept, lse, *rest, self.needs)

    def judge(self, got):
        out, lse, *grads = got
        assert out.transpose(1, 2).is_contiguous()
        assert len({id(x) for x in got}) == 6
        names, dtype = ("out", "lse", "dquery", "dkey", "dvalue", "dbias"), self.dout.dtype
        low, exact = self.expected(torch.float32, out), self.expected(torch.float64)
        judge_attention(names, got, low, exact, dtype, [True, True, *self.needs], self.tf32)
        _, key, _, start, end = self.inputs
        empty = ~visible(start, end, key.shape[2]).any(-1)
        empty = (empty if empty.dim() == 3 else empty[None, None]).expand(lse.shape)
        assert (out[empty] == 0).all()
        assert (lse[empty] == -float("inf")).all()
        if self.needs[0]:
            assert (grads[0][empty] == 0).all()


class Perceiver:
    """perceiver_attention and its backward: n latents over s media tokens and themselves."""

    def __init__(
        self, n, s, latents, lengths, dtype, *, widths=(20, 24), scale=0.3, tf32=False, needs=(True,) * 5
    ):
        b, (dh, dv) = len(lengths) if lengths else 2, widths
        query = heads_last(b, 2, n, dh, dtype)
        sources = [heads_last(b, 1, t, d, dtype) for t in (s, latents) for d in widths]
        self.inputs = (query, *sources, torch.tensor(lengths) if lengths else None)
        self.dout = torch.randn(b, 2, n, dv).to(dtype)
        self.scale, self.tf32, self.needs = scale, tf32, list(needs)

    def launch(self):
        out, lse = triton_perceiver.perceiver_attention(*self.inputs, self.scale)
        saved = (self.dout, *self.inputs, out, lse, self.scale)
        return out, lse, *triton_perceiver.perceiver_attention_bwd(*saved, self.needs)

    def expected(self, work):
        dout, *inputs = widened((self.dout, *self.inputs), work)
        out, lse = perceiver_attention_fwd(*inputs, self.scale)
        kept = out.to(self.dout.dtype).to(work) if work == torch.float32 else out
        return out, lse, *perceiver_attention_bwd(dout, *inputs, kept, lse, self.scale, self.needs)

    def judge(self, got):
        names = ("out", "lse", "dquery", "dmedia_key", "dmedia_value", "dlatent_key", "dlatent_value")
        low, exact = self.expected(torch.float32), self.expected(torch.float64)
        judge_attention(names, got, low, exact, self.dout.dtype, [True, True, *self.needs], self.tf32)
