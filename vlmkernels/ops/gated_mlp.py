"""out = (act(x w_gate^T + b_gate) * (x w_up^T + b_up)) w_down^T + b_down + residual."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels._modules import are_plain, is_fused_by_compiler
from vlmkernels._packed import PACKED, by_rows, packed_linear
from vlmkernels.ops import _dense as dense
from vlmkernels.reference import gated_mlp as composition
from vlmkernels.reference.gated_mlp import gated_mlp_bwd, gated_mlp_fwd


@arguments.public
def gated_mlp(
    x: Tensor,  # [..., K]
    w_gate: Tensor,  # [H, K]
    w_up: Tensor,  # [H, K]
    w_down: Tensor,  # [O, H]
    *,
    b_gate: Tensor | None = None,  # [H]
    b_up: Tensor | None = None,  # [H]
    b_down: Tensor | None = None,  # [O]
    activation: str = "silu",
    residual: Tensor | None = None,  # [..., O]
) -> Tensor:  # [..., O]
    """The gated feed-forward layer of LLaMA-like models (SwiGLU, GEGLU: Shazeer 2020, arXiv 2002.05202).

    ``(act(x @ w_gate.T + b_gate) * (x @ w_up.T + b_up)) @ w_down.T + b_down + residual``

    Args:
        x: ``[..., K]``, any strides.
        w_gate, w_up: ``[H, K]``, as in ``torch.nn.Linear``; dtype and device of ``x``, like all weights and
            biases.
        w_down: ``[O, H]``.
        b_gate, b_up: ``[H]`` or None.
        b_down: ``[O]`` or None.
        activation: one of those of `vlmkernels.linear`.
        residual: added to the result; of the same shape.

    Returns:
        A new tensor of dtype ``promote_types(x, residual)``. Products are summed in float32 (float64 for
        float64 inputs). The backward keeps ``x`` and the two products before the activation, in the dtype of
        ``x``; without a backward they exist for some rows at a time on a CPU. Autocast casts all but
        ``residual``.

    On subclasses of Tensor (distributed, quantized weights) the operations of torch run, as they define them.

    Raises:
        ValueError: naming every invalid argument.
    """
    inner, hidden, outputs = dense.size(x, -1), dense.size(w_gate, 0), dense.size(w_down, 0)
    dense.check(
        "gated_mlp",
        x,
        [("w_gate", w_gate, None, inner), ("w_up", w_up, hidden, inner), ("w_down", w_down, None, hidden)],
        [("b_gate", b_gate, hidden), ("b_up", b_up, hidden), ("b_down", b_down, outputs)],
        activation,
        residual,
        outputs,
    )
    if is_fused_by_compiler(x) or not are_plain(x, w_gate, w_up, w_down, b_gate, b_up, b_down, residual):
        return composition(
            x, w_gate, w_up, w_down, b_gate=b_gate, b_up=b_up, b_down=b_down, activation=activation,
            residual=residual,
        )  # fmt: skip
    if PACKED and not torch.is_grad_enabled():

        def packed(x: Tensor, residual: Tensor | None) -> Tensor | None:
            gate = packed_linear(x, w_gate, b_gate, activation, None)
            up = packed_linear(x, w_up, b_up, "none", None)
            if gate is None or up is None:
                return None
            return packed_linear(gate.mul_(up), w_down, b_down, "none", residual)

        out = by_rows(packed, x, residual)
        if out is not None:
            return out
    keep = dense.trained(x, w_gate, w_up, w_down, b_gate, b_up)
    return _op(x, w_gate, w_up, w_down, b_gate, b_up, b_down, residual, activation, keep)[0]


def _fake(x, w_gate, w_up, w_down, b_gate, b_up, b_down, residual, activation, keep):
    torch._check(
        x.shape[-1] == w_gate.shape[1] and w_gate.shape == w_up.shape and w_gate.shape[0] == w_down.shape[1],
        lambda: f"x {x.shape}, w_gate {w_gate.shape}, w_up {w_up.shape}, w_down {w_down.shape} do not match",
    )
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    kept = (*x.shape[:-1], w_gate.shape[0]) if keep else 0
    return x.new_empty((*x.shape[:-1], w_down.shape[0]), dtype=dtype), x.new_empty(kept), x.new_empty(kept)


def _fake_bwd(dout, x, w_gate, w_up, w_down, b_gate, b_up, gate, up, activation, needs):
    (hidden, inner), outputs = w_gate.shape, w_down.shape[0]
    weights = (w_gate.shape, w_up.shape, w_down.shape)
    shapes = ((*dout.shape[:-1], inner), *weights, (hidden,), (hidden,), (outputs,))
    return dense.empty_grads(w_gate, shapes, needs)


def _flops(x, w_gate, w_up, w_down, *_, **__):
    return 2 * x[:-1].numel() * (w_gate.numel() + w_up.numel() + w_down.numel())


def _flops_bwd(dout, x, w_gate, w_up, w_down, b_gate, b_up, gate, up, activation, needs, **_):
    need_x, need_gate, need_up, need_down, need_b_gate, need_b_up, _ = needs
    first = 2 * need_x + need_gate + need_up
    second = need_down + (need_x or need_gate or need_up or need_b_gate or need_b_up)
    return 2 * dout[:-1].numel() * (w_gate.numel() * first + w_down.numel() * second)


def _setup_context(ctx, inputs, output) -> None:
    x, w_gate, w_up, w_down, b_gate, b_up, _, residual, activation, keep = inputs
    _, gate, up = output
    ctx.mark_non_differentiable(gate, up)
    ctx.set_materialize_grads(False)
    # Layers that are not trained save no input for the backward.
    x = x if any(ctx.needs_input_grad[1:3]) or not keep else None
    kept = (gate, up) if keep else (None, None)
    ctx.save_for_backward(x, w_gate, w_up, w_down, b_gate, b_up, *kept)
    ctx.activation = activation
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, needs, dout, *_):
    return dense.gradients(ctx, needs, dout, _OPERANDS, _bwd)


_OPERANDS = ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


_op = define(
    "gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate, Tensor? b_up,"
    " Tensor? b_down, Tensor? residual, str activation, bool keep) -> (Tensor out, Tensor gate, Tensor up)",
    reference=gated_mlp_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_OPERANDS,
)
_bwd = define(
    "gated_mlp_bwd(Tensor dout, Tensor? x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate,"
    " Tensor? b_up, Tensor? gate, Tensor? up, str activation, bool[7] needs) -> (Tensor dx, Tensor dw_gate,"
    " Tensor dw_up, Tensor dw_down, Tensor db_gate, Tensor db_up, Tensor db_down)",
    reference=gated_mlp_bwd,
    fake=_fake_bwd,
    flops=_flops_bwd,
)

if TRITON:
    from vlmkernels.triton import gated_mlp as _cuda

    kernel("gated_mlp", "CUDA", _cuda.gated_mlp, "cuBLAS, Triton")
    kernel("gated_mlp_bwd", "CUDA", _cuda.gated_mlp_bwd, "cuBLAS, Triton")
