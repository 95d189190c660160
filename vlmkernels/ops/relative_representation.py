"""A sample as its similarities to the anchors that are nearest: clamped, raised to a power, normalised."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.ops._retrieval import no_gradients
from vlmkernels.ops.topk_similarity import topk_similarity
from vlmkernels.reference.relative_representation import power_faults, relative_representation_fwd


@arguments.public
def relative_representation(
    x: Tensor,  # [Q, D]
    anchors: Tensor,  # [n, D]
    *,
    k: int = 800,
    p: float = 8.0,
) -> tuple[Tensor, Tensor]:  # [Q, min(k, n)] each
    """The relative representation of ASIF (Norelli et al. 2023): a row is its k nearest anchors.

    Cosine similarities to the k nearest anchors, those below 0 set to 0, to the power p, and divided by their
    L2 norm. Two encoders whose anchors are pairs have comparable representations: see `relative_similarity`.
    The published code clamps nothing, and an even p makes negative similarities positive; where the k largest
    are positive, the results are the same.

    Args:
        x: ``[Q, D]``, any norm.
        anchors: ``[n, D]``, any norm.
        k: how many anchors a row keeps; clamped to n.
        p: the power, positive.

    Returns:
        values: ``[Q, min(k, n)]``, float32 (float64 if x or anchors is). Rows have norm 1, or are 0 where no
            similarity is positive. NaN where a similarity that is kept is NaN; those are kept last.
        indices: ``[Q, min(k, n)]`` int64, ascending. Of equally near anchors that of the lower index is kept.

        Neither has a gradient.

    Raises:
        ValueError: naming every invalid argument.
    """
    faults = power_faults(p)
    if x.dim() != 2:
        faults.append(f"x must be [Q, D], got {tuple(x.shape)}")
    if anchors.dim() != 2 or anchors.shape[-1:] != x.shape[-1:]:
        faults.append(f"anchors must be [n, D] with the D of x {tuple(x.shape)}, got {tuple(anchors.shape)}")
    if k < 1:
        faults.append(f"k must be at least 1, got {k}")
    faults += arguments.dtype_faults({"x": x, "anchors": anchors})
    faults += arguments.device_faults({"x": x, "anchors": anchors})
    if faults:
        raise ValueError("relative_representation: " + "; ".join(faults))
    similarities, indices = topk_similarity(x, anchors, k, normalize=True, return_sorted=False)
    return _op(similarities, p), indices


def _fake(similarities, p):
    return similarities.new_empty(
        similarities.shape, dtype=torch.promote_types(similarities.dtype, torch.float32)
    )


_op = define(
    "relative_representation(Tensor similarities, float p) -> Tensor",
    reference=relative_representation_fwd,
    fake=_fake,
    flops=lambda *_, **__: 0,
    setup_context=no_gradients,
)

if TRITON:
    from vlmkernels.triton import relative_representation as _triton

    kernel("relative_representation", "CUDA", _triton.relative_representation, "Triton")
