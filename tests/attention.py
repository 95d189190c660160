"""Judging attention by float64 and by two forms of plain PyTorch: autograd, and the reference kernels.

The reference kernels form the gradient of the logits from the stored result and log-sum-exp, as every kernel
does that keeps no probabilities; what that costs in rounding, autograd does not show.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmkernels.reference import interval_attention as definition
from vlmkernels.reference.interval_attention import interval_attention_bwd, interval_attention_fwd
from vlmkernels.testing import assert_as_good, result_and_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class ReferenceKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, start, end, scale, relative_bias, rows, cols):
        out, lse = interval_attention_fwd(query, key, value, start, end, scale, relative_bias, rows, cols)
        ctx.save_for_backward(query, key, value, start, end, out, lse)
        ctx.rest = scale, relative_bias, rows, cols
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 6)]
        grads = interval_attention_bwd(dout, dlse, *ctx.saved_tensors, *ctx.rest, needs)
        dq, dk, dv, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
        return dq, dk, dv, None, None, None, dbias, None, None


def by_reference_kernels(
    query, key, value, start, end, *, scale=None, return_lse=False, relative_bias=None, grid=None
):
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    rows_cols = grid if relative_bias is not None else (0, 0)
    out, lse = ReferenceKernels.apply(query, key, value, start, end, scale, relative_bias, *rows_cols)
    return (out, lse) if return_lse else out


def implementations(op: Callable) -> dict[str, Callable]:
    """The op on CPU tensors, and where there is a GPU with all tensors moved there and back."""

    def move(x: object) -> object:
        return x.cuda() if isinstance(x, Tensor) else x

    def on_cuda(*args: object, **options: object) -> Tensor | tuple[Tensor, ...]:
        out = op(*map(move, args), **{name: move(x) for name, x in options.items()})
        return out.cpu() if isinstance(out, Tensor) else tuple(x.cpu() for x in out)

    return {"dispatched": op, **({"cuda": on_cuda} if torch.cuda.is_available() else {})}


def assert_attention_as_good(
    wrap: Callable[[Callable], Callable],
    op: Callable,
    inputs: Sequence[Tensor],
    *,
    exact: Callable = definition,
    kernels: Callable = by_reference_kernels,
) -> None:
    """`wrap(attention)` is a function of `inputs`; with `op` it must be as good as with the references."""

    def results(attention: Callable, dtype: torch.dtype | None) -> list[Tensor | None]:
        same = [x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad) for x in inputs]
        return result_and_gradients(wrap(attention), same)

    double = inputs[0].dtype == torch.float64
    got = results(op, None)
    truth = results(exact, torch.float64)
    lows = [results(exact, torch.float64 if double else torch.float32), results(kernels, None)]
    names = ["result", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, ours, best, *theirs in zip(names, got, truth, *lows, strict=True):
        if ours is None or best is None:
            assert ours is best, f"{name}: given by one side only"
            continue
        assert_as_good(ours, [low.to(ours.dtype) for low in theirs], best, name=name)
