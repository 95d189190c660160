"""out = sum_l (a_l language + b_l visual_l) / sqrt(L), a and b a gate and its complement, each cut at tau."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, empty_grads, kernel
from vlmkernels.reference.srau import srau_bwd, srau_fwd

ORIENTATIONS = ("code", "paper")


@arguments.public
def srau(
    language: Tensor,  # [..., D]
    visual: Tensor,  # [L, ..., D] or [..., D]
    gate_logits: Tensor,  # as visual
    tau: float,
    *,
    row_mask: Tensor | None = None,  # [...] bool
    orientation: str = "code",
) -> Tensor:  # [..., D]
    """Blend a stream of text with what it attends to in each of L levels of an image, in one pass.

    The self-resurrecting activation unit of VisualGPT (Chen et al. 2022, section 3.2): with
    ``alpha = sigmoid(gate_logits)``,

        out = sum over levels of (a language + b visual) / sqrt(L),
        a = alpha [alpha > tau],  b = (1 - alpha) [alpha < 1 - tau]

    The thresholds are constants for the derivative.

    Args:
        language: hidden states of the text ``[..., D]``.
        visual: of each level what the text attends to ``[L, ..., D]``, L ≥ 1, or ``[..., D]`` for one level.
        gate_logits: of the shape of ``visual``.
        tau: threshold in [0, 0.5]; below it, a side of the gate is cut.
        row_mask: bool ``language.shape[:-1]``; rows where it is False are 0, whatever the tensors hold there
            (even NaN), and get no gradient.
        orientation: ``"code"``, the authors' code, whose gate weighs the text, or ``"paper"``, whose gate
            weighs the image: the same with the logits negated.

    Returns:
        A new tensor of dtype ``promote_types(language, visual)``; that of the logits never promotes. Sums run
        in float32 (float64 if a tensor is float64).

    Raises:
        ValueError: naming every argument of invalid shape, dtype, value or device.
    """
    tensors = {"language": language, "visual": visual, "gate_logits": gate_logits}
    faults = []
    shape = tuple(language.shape)
    # In code recorded with symbolic sizes, L is not to be compared with the size of a batch
    levels = visual.shape[: visual.dim() - language.dim()]
    fits = len(levels) <= 1 and 0 not in levels and tuple(visual.shape[len(levels) :]) == shape
    if language.dim() == 0:
        faults.append("language must be [..., D], got ()")
    elif not fits:
        expected = f"[L, {', '.join(map(str, shape))}] with L ≥ 1, or as language {shape}"
        faults.append(f"visual must be {expected}, got {tuple(visual.shape)}")
    if gate_logits.shape != visual.shape:
        faults.append(f"gate_logits must be as visual {tuple(visual.shape)}, got {tuple(gate_logits.shape)}")
    if arguments.is_number(tau) and not 0 <= tau <= 0.5:
        faults.append(f"tau must be in [0, 0.5], got {tau}")
    if row_mask is not None and (row_mask.dtype != torch.bool or row_mask.shape != language.shape[:-1]):
        faults.append(f"row_mask must be bool {shape[:-1]}, got {row_mask.dtype} {tuple(row_mask.shape)}")
    if orientation not in ORIENTATIONS:
        faults.append(f"orientation must be 'code' or 'paper', got {orientation!r}")
    faults += arguments.dtype_faults(tensors)
    faults += arguments.device_faults({**tensors, "row_mask": row_mask})
    if faults:
        raise ValueError("srau: " + "; ".join(faults))
    return _op(language, visual, gate_logits, row_mask, tau, orientation)


def _fake(language, visual, gate_logits, row_mask, tau, orientation):
    shapes = visual.shape, gate_logits.shape
    torch._check(shapes[0] == shapes[1], lambda: f"visual {shapes[0]} and gate_logits {shapes[1]} differ")
    return language.new_empty(language.shape, dtype=torch.promote_types(language.dtype, visual.dtype))


def _fake_bwd(dout, language, visual, gate_logits, row_mask, tau, orientation, needs):
    return empty_grads((language, visual, gate_logits), needs)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.tau, ctx.orientation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, needs, dout):
    names = ("language", "visual", "gate_logits")
    grads = _bwd(dout, *ctx.saved_tensors, ctx.tau, ctx.orientation, [needs[name] for name in names])
    return dict(zip(names, grads, strict=True))


_TENSORS = "Tensor language, Tensor visual, Tensor gate_logits, Tensor? row_mask, float tau, str orientation"

_op = define(
    f"srau({_TENSORS}) -> Tensor",
    reference=srau_fwd,
    fake=_fake,
    flops=lambda *_, **__: 0,
    setup_context=_setup_context,
    backward=_backward,
)
_bwd = define(
    f"srau_bwd(Tensor dout, {_TENSORS}, bool[3] needs)"
    " -> (Tensor dlanguage, Tensor dvisual, Tensor dgate_logits)",
    reference=srau_bwd,
    fake=_fake_bwd,
    flops=lambda *_, **__: 0,
)

if TRITON:
    from vlmkernels.triton import srau as _triton

    kernel("srau", "CUDA", _triton.srau, "Triton")
    kernel("srau_bwd", "CUDA", _triton.srau_bwd, "Triton")
