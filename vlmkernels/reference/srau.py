"""out = sum_l (a_l language + b_l visual_l) / sqrt(L), a and b the gate and its complement, each cut at tau.

With alpha = sigmoid(gate_logits), of the negated logits in the orientation of the paper, and [.] 1 or 0,

    a = alpha [alpha > tau]        b = (1 - alpha) [alpha < 1 - tau]

The cuts are constants for the derivative, and d alpha = alpha (1 - alpha) d gate_logits. With
g = dout / sqrt(L) on the rows that the mask keeps and 0 on the others:

    dlanguage     = g sum_l a_l
    dvisual_l     = g b_l
    dgate_logits_l = g alpha_l (1 - alpha_l) ([alpha_l > tau] language - [alpha_l < 1 - tau] visual_l)

with the opposite sign for the last in the orientation of the paper. Where one side is cut, the gradient of
the gate is that of the other side: a unit that is off can come back.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def srau(
    language: Tensor,  # [..., D]
    visual: Tensor,  # [L, ..., D] or [..., D]
    gate_logits: Tensor,  # as visual
    tau: float,
    *,
    row_mask: Tensor | None = None,  # [...] bool
    orientation: str = "code",
) -> Tensor:  # [..., D]
    """The definition, differentiable by autograd."""
    return srau_fwd(language, visual, gate_logits, row_mask, tau, orientation)


def _work(*tensors: Tensor) -> torch.dtype:
    work = torch.float32
    for tensor in tensors:
        work = torch.promote_types(work, tensor.dtype)
    return work


def _weights(logits: Tensor, tau: float, orientation: str) -> tuple[Tensor, ...]:
    """alpha, 1 - alpha, and both with what the threshold cuts set to 0; a NaN stays one."""
    logits = logits if orientation == "code" else -logits
    alpha, rest = logits.sigmoid(), (-logits).sigmoid()
    return alpha, rest, alpha.masked_fill(alpha <= tau, 0), rest.masked_fill(alpha >= 1 - tau, 0)


def _levels(language: Tensor, *tensors: Tensor) -> list[Tensor]:
    """With the dimension of the levels in front."""
    return [tensor.unsqueeze(0) if tensor.dim() == language.dim() else tensor for tensor in tensors]


def srau_fwd(
    language: Tensor,
    visual: Tensor,
    gate_logits: Tensor,
    row_mask: Tensor | None,
    tau: float,
    orientation: str,
) -> Tensor:
    work, dtype = _work(language, visual, gate_logits), torch.promote_types(language.dtype, visual.dtype)
    seen, logits = _levels(language, visual.to(work), gate_logits.to(work))
    heard = language.to(work)
    if row_mask is not None:
        kept = row_mask[..., None]
        heard, seen, logits = (torch.where(kept, x, 0) for x in (heard, seen, logits))
    _, _, a, b = _weights(logits, tau, orientation)
    out = (a * heard + b * seen).sum(0) / math.sqrt(seen.shape[0])
    return out.to(dtype).contiguous()


def srau_bwd(
    dout: Tensor,  # [..., D]
    language: Tensor,  # [..., D]
    visual: Tensor,  # [L, ..., D] or [..., D]
    gate_logits: Tensor,  # as visual
    row_mask: Tensor | None,  # [...]
    tau: float,
    orientation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dlanguage, dvisual and dgate_logits; an output that is not needed has size 0."""
    work = _work(dout, language, visual, gate_logits)
    seen, logits = _levels(language, visual.to(work), gate_logits.to(work))
    g, heard = dout.to(work) / math.sqrt(seen.shape[0]), language.to(work)
    if row_mask is not None:
        kept = row_mask[..., None]
        g, heard, seen, logits = (torch.where(kept, x, 0) for x in (g, heard, seen, logits))
    alpha, rest, a, b = _weights(logits, tau, orientation)
    inputs = (language, visual, gate_logits)
    grads = [x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needs, strict=True)]
    if needs[0]:
        grads[0].copy_(g * a.sum(0))
    if needs[1]:
        grads[1].copy_((g * b).view_as(grads[1]))
    if needs[2]:
        slope = (
            rest * a * heard - alpha * b * seen
        )  # d(a language + b visual) / d alpha, times alpha (1 - alpha)
        grads[2].copy_((g * slope if orientation == "code" else g * -slope).view_as(grads[2]))
    return grads[0], grads[1], grads[2]
