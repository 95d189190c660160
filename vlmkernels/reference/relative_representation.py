"""A sample as its similarities to anchors (ASIF: Norelli et al. 2023).

With s_j = <x / |x|, a_j / |a_j|>, norms of at least 1e-12, and N the k anchors of the largest s_j (ties by
the lower index, NaN last):

    r_j = max(s_j, 0)^p for j in N,    representation: (r / |r|, N), in ascending order of j

r = 0 where no s_j of N is positive. As r / |r| does not depend on the scale of s, r_j is computed as
(s_j / max s)^p: powers of small similarities would underflow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.reference.topk_similarity import topk_similarity


def relative_representation(
    x: Tensor,  # [Q, D]
    anchors: Tensor,  # [n, D]
    *,
    k: int = 800,
    p: float = 8.0,
) -> tuple[Tensor, Tensor]:  # [Q, min(k, n)] each
    """The definition: values and indices."""
    similarities, indices = topk_similarity(x, anchors, k, normalize=True, return_sorted=False)
    return relative_representation_fwd(similarities, p), indices


def relative_representation_fwd(
    similarities: Tensor,  # [Q, k]
    p: float,
) -> Tensor:  # [Q, k]
    """The raw op: what follows the search for the anchors."""
    faults = power_faults(p)
    if similarities.dim() != 2:
        faults.append(f"similarities must be [Q, k], got {list(similarities.shape)}")
    if faults:
        raise ValueError("relative_representation: " + "; ".join(faults))
    s = similarities.to(torch.promote_types(similarities.dtype, torch.float32)).clamp_min(0)
    s = s.contiguous()
    if s.shape[1] == 0:
        return s
    top = s.amax(1, keepdim=True)
    return F.normalize((s / top).where(top != 0, s).pow(p), dim=1)


def power_faults(p: float) -> list[str]:
    return [] if 0 < p < float("inf") else [f"p must be positive and finite, got {p}"]
