"""out = act(x w1^T + b1) w2^T + b2 + residual."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels._modules import are_plain, is_fused_by_compiler
from vlmkernels._packed import PACKED, by_rows, packed_linear
from vlmkernels.ops import _dense as dense
from vlmkernels.reference import mlp as composition
from vlmkernels.reference.mlp import mlp_bwd, mlp_fwd


@arguments.public
def mlp(
    x: Tensor,  # [..., K]
    w1: Tensor,  # [H, K]
    b1: Tensor | None,  # [H]
    w2: Tensor,  # [O, H]
    b2: Tensor | None,  # [O]
    *,
    activation: str,
    residual: Tensor | None = None,  # [..., O]
) -> Tensor:  # [..., O]
    """Two linear layers with an activation between them: ``act(x @ w1.T + b1) @ w2.T + b2 + residual``.

    Args:
        x: ``[..., K]``, any strides.
        w1: ``[H, K]``, as in ``torch.nn.Linear``; dtype and device of ``x``, like all weights and biases.
        b1: ``[H]`` or None.
        w2: ``[O, H]``.
        b2: ``[O]`` or None.
        activation: one of those of `vlmkernels.linear`.
        residual: added to the result; of the same shape.

    Returns:
        A new tensor of dtype ``promote_types(x, residual)``. Products are summed in float32 (float64 for
        float64 inputs). The backward keeps ``x`` and ``x @ w1.T + b1`` in the dtype of ``x``; without a
        backward the hidden layer exists for some rows at a time on a CPU. Autocast casts all but
        ``residual``.

    On subclasses of Tensor (distributed, quantized weights) the operations of torch run, as they define them.

    Raises:
        ValueError: naming every invalid argument.
    """
    hidden, outputs = dense.size(w1, 0), dense.size(w2, 0)
    dense.check(
        "mlp",
        x,
        [("w1", w1, None, dense.size(x, -1)), ("w2", w2, None, hidden)],
        [("b1", b1, hidden), ("b2", b2, outputs)],
        activation,
        residual,
        outputs,
    )
    if is_fused_by_compiler(x) or not are_plain(x, w1, b1, w2, b2, residual):
        return composition(x, w1, b1, w2, b2, activation=activation, residual=residual)
    if PACKED and not torch.is_grad_enabled():

        def packed(x: Tensor, residual: Tensor | None) -> Tensor | None:
            inner = packed_linear(x, w1, b1, activation, None)
            return None if inner is None else packed_linear(inner, w2, b2, "none", residual)

        out = by_rows(packed, x, residual)
        if out is not None:
            return out
    return _op(x, w1, b1, w2, b2, residual, activation, dense.trained(x, w1, b1, w2))[0]


def _fake(x, w1, b1, w2, b2, residual, activation, keep):
    torch._check(
        x.shape[-1] == w1.shape[1] and w1.shape[0] == w2.shape[1],
        lambda: f"x {x.shape}, w1 {w1.shape} and w2 {w2.shape} do not match",
    )
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=dtype)
    return out, x.new_empty((*x.shape[:-1], w1.shape[0]) if keep else 0)


def _fake_bwd(dout, x, w1, b1, w2, y, activation, needs):
    (hidden, inner), outputs = w1.shape, w2.shape[0]
    shapes = ((*dout.shape[:-1], inner), w1.shape, (hidden,), w2.shape, (outputs,))
    return dense.empty_grads(w1, shapes, needs)


def _flops(x, w1, b1, w2, *_, **__):
    return 2 * x[:-1].numel() * (w1.numel() + w2.numel())


def _flops_bwd(dout, x, w1, b1, w2, y, activation, needs, **_):
    need_x, need_w1, need_b1, need_w2, _ = needs
    first, second = need_x + need_w1, need_w2 + (need_x or need_w1 or need_b1)
    return 2 * dout[:-1].numel() * (w1.numel() * first + w2.numel() * second)


def _setup_context(ctx, inputs, output) -> None:
    x, w1, b1, w2, _, residual, activation, keep = inputs
    _, y = output
    ctx.mark_non_differentiable(y)
    ctx.set_materialize_grads(False)
    # A layer that is not trained saves no input for the backward.
    x = x if ctx.needs_input_grad[1] or not keep else None
    ctx.save_for_backward(x, w1, b1, w2, y if keep else None)
    ctx.activation = activation
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, needs, dout, _):
    return dense.gradients(ctx, needs, dout, ("x", "w1", "b1", "w2", "b2"), _bwd)


_op = define(
    "mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, str activation, bool keep)"
    " -> (Tensor out, Tensor preactivation)",
    reference=mlp_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "w1", "b1", "w2", "b2"),
)
_bwd = define(
    "mlp_bwd(Tensor dout, Tensor? x, Tensor w1, Tensor? b1, Tensor w2, Tensor? preactivation, str activation,"
    " bool[5] needs) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    reference=mlp_bwd,
    fake=_fake_bwd,
    flops=_flops_bwd,
)

if TRITON:
    from vlmkernels.triton import mlp as _cuda

    kernel("mlp", "CUDA", _cuda.mlp, "cuBLAS, Triton")
    kernel("mlp_bwd", "CUDA", _cuda.mlp_bwd, "cuBLAS, Triton")
