"""Trials of linear, mlp and gated_mlp."""

import torch
from torch import Tensor

from vlmkernels.reference.gated_mlp import gated_mlp_bwd, gated_mlp_fwd
from vlmkernels.reference.linear import linear_bwd, linear_fwd
from vlmkernels.reference.mlp import mlp_bwd, mlp_fwd
from vlmkernels.triton import gated_mlp, linear, mlp

from .trials import judge, widened

OPS = {  # launchers and references of both ways, and the names of the weights and biases
    "linear": (linear.linear, linear.linear_bwd, linear_fwd, linear_bwd, ("w", "b")),
    "mlp": (mlp.mlp, mlp.mlp_bwd, mlp_fwd, mlp_bwd, ("w1", "b1", "w2", "b2")),
    "gated_mlp": (
        gated_mlp.gated_mlp, gated_mlp.gated_mlp_bwd, gated_mlp_fwd, gated_mlp_bwd,
        ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"),
    ),
}  # fmt: skip
WITHOUT = {"linear": (), "mlp": ("b2",), "gated_mlp": ("b_down",)}  # what a backward does not take


class Layer:
    """One of the ops and its backward; `sizes` are the widths of x, of the hidden layer and of the result."""

    def __init__(
        self,
        op: str,
        n: int,
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        *,
        activation: str = "gelu",
        bias: bool = True,
        residual: torch.dtype | None = None,
        keep: bool = True,
        needs: tuple[bool, ...] | None = None,
    ):
        self.op, self.activation, self.keep = op, activation, keep
        *self.functions, names = OPS[op]
        shapes = {"w": (1, 0), "w1": (1, 0), "w_gate": (1, 0), "w_up": (1, 0), "w2": (2, 1), "w_down": (2, 1)}
        self.x = torch.randn(n, sizes[0]).to(dtype)
        self.weights: dict[str, Tensor | None] = {}
        for name in names:
            out, into = (sizes[i] for i in shapes[name.replace("b", "w")])
            weight = torch.randn(out, into) / max(into, 1) ** 0.5 if name[0] == "w" else torch.randn(out)
            self.weights[name] = weight.to(dtype) if name[0] == "w" or bias else None
        self.residual = torch.randn(n, sizes[-1]).to(residual) if residual else None
        self.dout = torch.randn(n, sizes[-1]).to(torch.promote_types(dtype, residual or dtype))
        self.needs = needs or (True, *(x is not None for x in self.weights.values()))

    def run(self, forward, backward, x, weights, residual, dout):
        out, *kept = forward(x, *weights.values(), residual, self.activation, self.keep)
        saved = [weight for name, weight in weights.items() if name not in WITHOUT[self.op]]
        again = [y if self.keep and y.numel() else None for y in kept]
        return out, *kept, *backward(dout, x, *saved, *again, self.activation, self.needs)

    def launch(self):
        return self.run(*self.functions[:2], self.x, self.weights, self.residual, self.dout)

    def expected(self, work: torch.dtype | None):
        tensors = [self.x, self.residual, self.dout, *self.weights.values()]
        x, residual, dout, *weights = tensors if work is None else widened(tensors, work)
        weights = dict(zip(self.weights, weights, strict=True))
        return self.run(*self.functions[2:], x, weights, residual, dout)

    def judge(self, got):
        dtypes = [self.dout.dtype, *[self.x.dtype] * (len(got) - 1)]
        low = [x.to(dtype) for x, dtype in zip(self.expected(torch.float32), dtypes, strict=True)]
        if self.dout.dtype != self.x.dtype:  # the layer is rounded before it is added to the residual
            low[0] = low[0], self.expected(None)[0]
        grads = [f"d{name}" for name in ("x", *self.weights)]
        kept = ["kept"] * (len(got) - len(grads) - 1)
        needs = (*[True] * (1 + len(kept)), *self.needs)
        judge(["out", *kept, *grads], got, low, self.expected(torch.float64), needs)
