"""out = act(x weight^T + bias) + residual."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels._modules import are_plain, is_fused_by_compiler
from vlmkernels._packed import PACKED, packed_linear
from vlmkernels.ops import _dense as dense
from vlmkernels.reference import linear as composition
from vlmkernels.reference.linear import linear_bwd, linear_fwd


@arguments.public
def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None = None,  # [O]
    *,
    activation: str = "none",
    residual: Tensor | None = None,  # [..., O]
) -> Tensor:  # [..., O]
    """A linear layer, its activation and a residual: ``act(x @ weight.T + bias) + residual``.

    Args:
        x: ``[..., K]``, any strides.
        weight: ``[O, K]``, as in ``torch.nn.Linear``; dtype and device of ``x``.
        bias: ``[O]``, dtype of ``x``.
        activation: "none", "gelu" (exact), "gelu_tanh", "quick_gelu" (``y * sigmoid(1.702 y)``, as in
            OpenAI's CLIP), "silu", "relu" or "squared_relu".
        residual: added to the result; of the same shape.

    Returns:
        A new tensor of dtype ``promote_types(x, residual)``. Products are summed in float32 (float64 for
        float64 inputs). The backward keeps ``x`` and, if there is an activation, ``x @ weight.T + bias`` in
        the dtype of ``x``. Autocast casts ``x``, ``weight`` and ``bias``.

    On subclasses of Tensor (distributed, quantized weights) the operations of torch run, as they define them.

    Raises:
        ValueError: naming every invalid argument.
    """
    outputs = dense.size(weight, 0)
    dense.check(
        "linear",
        x,
        [("weight", weight, None, dense.size(x, -1))],
        [("bias", bias, outputs)],
        activation,
        residual,
        outputs,
    )
    if is_fused_by_compiler(x) or not are_plain(x, weight, bias, residual):
        return composition(x, weight, bias, activation=activation, residual=residual)
    if PACKED and not torch.is_grad_enabled():
        out = packed_linear(x, weight, bias, activation, residual)
        if out is not None:
            return out
    return _op(x, weight, bias, residual, activation, dense.trained(x, weight, bias))[0]


def _fake(x, weight, bias, residual, activation, keep):
    torch._check(
        x.shape[-1] == weight.shape[1], lambda: f"x {x.shape} and weight {weight.shape} do not match"
    )
    shape = (*x.shape[:-1], weight.shape[0])
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape if keep and activation != "none" else 0)


def _fake_bwd(dout, x, weight, bias, y, activation, needs):
    shapes = ((*dout.shape[:-1], weight.shape[1]), weight.shape, weight.shape[:1])
    return dense.empty_grads(weight, shapes, needs)


def _flops(x, weight, *_, **__):
    return 2 * x.numel() * weight[0]


def _flops_bwd(dout, x, weight, bias, y, activation, needs, **_):
    need_x, need_weight, _ = needs
    return 2 * dout.numel() * weight[1] * (need_x + need_weight)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, residual, activation, keep = inputs
    _, y = output
    ctx.mark_non_differentiable(y)
    ctx.set_materialize_grads(False)
    formed = keep and activation != "none"
    again = activation != "none" and not keep
    # A layer that is not trained saves no input for the backward.
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] or again else None, weight, bias, y if formed else None
    )
    ctx.activation = activation
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, needs, dout, _):
    return dense.gradients(ctx, needs, dout, ("x", "weight", "bias"), _bwd)


_op = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool keep)"
    " -> (Tensor out, Tensor preactivation)",
    reference=linear_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight", "bias"),
)
_bwd = define(
    "linear_bwd(Tensor dout, Tensor? x, Tensor weight, Tensor? bias, Tensor? preactivation, str activation,"
    " bool[3] needs) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference=linear_bwd,
    fake=_fake_bwd,
    flops=_flops_bwd,
)

if TRITON:
    from vlmkernels.triton import linear as _cuda

    kernel("linear", "CUDA", _cuda.linear, "cuBLAS, Triton")
    kernel("linear_bwd", "CUDA", _cuda.linear_bwd, "cuBLAS, Triton")
