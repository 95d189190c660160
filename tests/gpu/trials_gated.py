"""Trials of gated_residual, gated_linear_residual and srau."""

import torch

from vlmkernels.reference.gated_linear_residual import gated_linear_residual_bwd, gated_linear_residual_fwd
from vlmkernels.reference.gated_residual import gated_residual_bwd, gated_residual_fwd
from vlmkernels.reference.srau import srau_bwd, srau_fwd
from vlmkernels.testing import assert_as_good
from vlmkernels.triton import gated_linear_residual as linear
from vlmkernels.triton import gated_residual as gated
from vlmkernels.triton import srau

from .trials import judge, strided, widened


class Residual:
    """gated_residual and its backward; masked rows of y hold NaN."""

    def __init__(
        self, n, d, dtype, *, y_dtype=None, per_channel=False, masked=False, needs=(True, True), gates=1.0
    ):
        self.x, self.y = torch.randn(n, d, dtype=dtype), torch.randn(n, d, dtype=y_dtype or dtype)
        self.gate = torch.randn(1, 1, d if per_channel else 1) * gates
        self.mask = torch.rand(n) > 0.4 if masked else None
        if masked:
            self.y = torch.where(self.mask[:, None], self.y, float("nan"))
        self.dout = torch.randn(n, d, dtype=torch.promote_types(dtype, y_dtype or dtype))
        self.needs = needs

    def launch(self):
        out = gated.gated_residual(self.x, strided(self.y), self.gate, self.mask)
        return out, *gated.gated_residual_bwd(strided(self.dout), self.y, self.gate, self.mask, self.needs)

    def expected(self, work=None):
        tensors = [self.x, self.y, self.dout, self.gate]
        x, y, dout, gate = tensors if work is None else widened(tensors, work)
        out = gated_residual_fwd(x, y, gate, self.mask)
        return out, *gated_residual_bwd(dout, y, gate, self.mask, self.needs)

    def judge(self, got):
        judge(("out", "dy", "dgate"), got, self.expected(), self.expected(torch.float64), (True, *self.needs))


class Levels:
    """srau and its backward; masked rows hold NaN."""

    def __init__(
        self, n, d, dtype, *, levels=3, tau=0.2, paper=False, masked=False, language=None, needs=(True,) * 3
    ):
        shape = (levels, n, d) if levels else (n, d)
        self.language = torch.randn(n, d).to(language or dtype)
        self.visual, self.logits = torch.randn(shape).to(dtype), (2 * torch.randn(shape)).to(dtype)
        self.mask = torch.rand(n) > 0.4 if masked else None
        if masked:
            for x in (self.language, self.visual, self.logits):
                x[..., ~self.mask, :] = float("nan")
        self.dout = torch.randn(n, d).to(torch.promote_types(language or dtype, dtype))
        self.options, self.needs = (self.mask, tau, "paper" if paper else "code"), needs

    def launch(self):
        inputs = strided(self.language), self.visual, self.logits, *self.options
        return srau.srau(*inputs), *srau.srau_bwd(strided(self.dout), *inputs, self.needs)

    def expected(self, work=None):
        tensors = [self.dout, self.language, self.visual, self.logits]
        dout, *inputs = tensors if work is None else widened(tensors, work)
        return srau_fwd(*inputs, *self.options), *srau_bwd(dout, *inputs, *self.options, self.needs)

    def judge(self, got):
        names = ("out", "dlanguage", "dvisual", "dlogits")
        judge(names, got, self.expected(), self.expected(torch.float64), (True, *self.needs))


class Linear:
    """gated_linear_residual and its backward; h in padded rows, NaN where masked."""

    def __init__(
        self,
        n,
        d,
        k,
        dtype,
        *,
        x_dtype=None,
        per_channel=False,
        masked=False,
        tf32=False,
        needs=(True, True, True),
    ):
        self.mask = torch.rand(n) > 0.4 if masked else None
        self.h = torch.full((n, k + 7), float("nan"), dtype=dtype)[:, 3:-4].copy_(torch.randn(n, k))
        self.weight = torch.randn(d, k).to(dtype) / max(k, 1) ** 0.5
        self.x = torch.randn(n, d).to(x_dtype or dtype)
        self.gate = torch.randn(1, 1, d if per_channel else 1)
        self.dout = torch.randn(n, d).to(torch.promote_types(self.x.dtype, dtype))
        if masked:
            self.h[~self.mask], self.dout[~self.mask] = float("nan"), float("nan")
        self.tf32, self.needs = tf32, needs

    def launch(self):
        out = linear.gated_linear_residual(self.x, self.h, self.weight, self.gate, self.mask)
        saved = (self.dout, self.h, self.weight, self.gate, self.mask)
        return out, *linear.gated_linear_residual_bwd(*saved, self.needs)

    def expected(self, work):
        h, weight, x, gate = widened((self.h, self.weight, self.x, self.gate), work)
        # dout enters products in the dtype of h
        dout = (self.dout.to(self.h.dtype) if work == torch.float32 else self.dout).to(work)
        grads = gated_linear_residual_bwd(dout, h, weight, gate, self.mask, self.needs)
        return gated_linear_residual_fwd(x, h, weight, gate, self.mask), *grads

    def in_chain(self):
        """The result in float32 from products added one after the other, as a GPU adds them."""
        h, weight, x, gate = widened((self.h, self.weight, self.x, self.gate), torch.float32)
        product = x.new_zeros(x.shape)
        for i in range(h.shape[1]):
            product += h[:, i, None] * weight[:, i]
        out = x + gate.view(-1).tanh() * product
        return out if self.mask is None else out.where(self.mask[:, None], x)

    def judge(self, got):
        low, exact = self.expected(torch.float32), self.expected(torch.float64)
        dtypes = (self.dout.dtype, self.h.dtype, self.weight.dtype, self.gate.dtype)
        low = [x.to(dtype) for x, dtype in zip(low, dtypes, strict=True)]
        if self.tf32:
            judge(("out",), got[:1], low[:1], exact[:1], cap=2e-3)
        else:
            assert_as_good(got[0], (low[0], self.in_chain().to(dtypes[0])), exact[0], name="out")
        if self.mask is not None:
            assert torch.equal(got[0][~self.mask], self.x[~self.mask].to(self.dout.dtype))
        rounded = {self.dout.dtype, self.h.dtype} != {torch.float32}
        names = ("dh", "dweight", "dgate")
        judge(names, got[1:], low[1:], exact[1:], self.needs, cap=4e-3 if rounded else None)
