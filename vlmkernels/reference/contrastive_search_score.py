"""The next token of contrastive search, with guidance by an image (MAGIC: Su et al. 2022, section 3.2).

Of the k candidates of a sample, with probability p, hidden state h and similarity f to the image (a scaled
logit):

    score_v = (1 - alpha) p_v - alpha max_j cos(h_v, h_j) + beta softmax(f)_v
    best = argmax score, ties by the lower index, NaN last

h_j are the context's hidden states, the first context_lengths of them; without any, the maximum is 0. Norms
are at least 1e-12. A term whose factor is 0 is not read.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_search_score(
    prob: Tensor,  # [B, k]
    hidden: Tensor,  # [B, k, D]
    context: Tensor,  # [B, t, D]
    similarity: Tensor | None,  # [B, k]
    *,
    alpha: float,
    beta: float,
    context_lengths: Tensor | None = None,  # [B]
) -> tuple[Tensor, Tensor]:  # [B] int64, [B, k]
    """The definition: best and score."""
    return contrastive_search_score_fwd(prob, hidden, context, similarity, context_lengths, alpha, beta)


def contrastive_search_score_fwd(
    prob: Tensor,  # [B, k]
    hidden: Tensor,  # [B, k, D]
    context: Tensor,  # [B, t, D]
    similarity: Tensor | None,  # [B, k]
    context_lengths: Tensor | None,  # [B]
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    faults = faults_of(prob, hidden, context, similarity, context_lengths, alpha, beta)
    if faults:
        raise ValueError("contrastive_search_score: " + "; ".join(faults))
    work = torch.promote_types(torch.promote_types(prob.dtype, hidden.dtype), torch.float32)
    if similarity is not None:
        work = torch.promote_types(work, similarity.dtype)
    score = (1 - alpha) * prob.detach().to(work).contiguous()
    if alpha != 0:
        score = score - alpha * _repetition(
            hidden.detach().to(work), context.detach().to(work), context_lengths
        )
    if similarity is not None and beta != 0:
        score = score + beta * similarity.detach().to(work).softmax(1)
    return score.where(~score.isnan(), -torch.inf).argmax(1), score


def _repetition(hidden: Tensor, context: Tensor, lengths: Tensor | None) -> Tensor:  # [B, k]
    """The largest cosine to a hidden state of the context."""
    t = context.shape[1]
    if t == 0:
        return hidden.new_zeros(hidden.shape[:2])
    cosines = F.normalize(hidden, dim=2) @ F.normalize(context, dim=2).mT  # [B, k, t]
    if lengths is None:
        return cosines.amax(2)
    length = lengths.clamp(0, t)[:, None]  # [B, 1]
    inside = torch.arange(t, device=context.device) < length  # [B, t]
    return cosines.where(inside[:, None], -torch.inf).amax(2).where(length > 0, 0)


def faults_of(
    prob: Tensor,
    hidden: Tensor,
    context: Tensor,
    similarity: Tensor | None,
    context_lengths: Tensor | None,
    alpha: float,
    beta: float,
) -> list[str]:
    faults = []
    if prob.dim() != 2 or prob.shape[1] == 0:
        faults.append(f"prob must be [B, k] of at least one candidate, got {list(prob.shape)}")
    if hidden.dim() != 3 or hidden.shape[:2] != prob.shape:
        faults.append(f"hidden must be [B, k, D] with [B, k] = {list(prob.shape)}, got {list(hidden.shape)}")
    batch, width = prob.shape[:1], hidden.shape[-1:]
    if context.dim() != 3 or (context.shape[:1], context.shape[2:]) != (batch, width):
        faults.append(
            f"context must be [B, t, D] with B = {[*batch]} and D = {[*width]}, got {list(context.shape)}"
        )
    if hidden.dtype != context.dtype:
        faults.append(f"hidden and context must have the same dtype, got {hidden.dtype} and {context.dtype}")
    if similarity is not None and similarity.shape != prob.shape:
        faults.append(f"similarity must be [B, k] = {list(prob.shape)}, got {list(similarity.shape)}")
    if similarity is None and beta != 0:
        faults.append(f"similarity must be given where beta is not 0, got None and beta {beta}")
    if context_lengths is not None and (
        context_lengths.shape != batch or context_lengths.dtype not in (torch.int32, torch.int64)
    ):
        faults.append(
            f"context_lengths must be int32 or int64 [B] = {[*batch]}, got "
            f"{context_lengths.dtype} {list(context_lengths.shape)}"
        )
    if not 0 <= alpha <= 1:
        faults.append(f"alpha must be from 0 to 1, got {alpha}")
    if not math.isfinite(beta):
        faults.append(f"beta must be finite, got {beta}")
    return faults
