"""out_i = sum_j p_ij v_j with one softmax p_i over the media tokens j < media_length, then all the latents.

A softmax does not depend on the order of its terms: this is interval attention over latents and media, in
that order, with the interval [0, L + media_length). Backward: `interval_attention_bwd`.
"""

import torch
from torch import Tensor

from vlmkernels.reference.interval_attention import interval_attention_bwd, interval_attention_fwd


def perceiver_attention(
    query: Tensor,  # [B, H, n, Dh]
    media_key: Tensor,  # [B, Hkv, S, Dh]
    media_value: Tensor,  # [B, Hkv, S, Dv]
    latent_key: Tensor,  # [B, Hkv, L, Dh]
    latent_value: Tensor,  # [B, Hkv, L, Dv]
    *,
    media_lengths: Tensor | None = None,  # [B]
    scale: float | None = None,
) -> Tensor:  # [B, H, n, Dv]
    """The definition, differentiable by autograd."""
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    return perceiver_attention_fwd(
        query, media_key, media_value, latent_key, latent_value, media_lengths, scale
    )[0]


def perceiver_attention_fwd(
    query, media_key, media_value, latent_key, latent_value, media_lengths, scale: float
) -> tuple[Tensor, Tensor]:
    key, value, start, end = _joined(query, media_key, media_value, latent_key, latent_value, media_lengths)
    return interval_attention_fwd(query, key, value, start, end, scale, None, 0, 0)


def perceiver_attention_bwd(
    dout: Tensor,  # [B, H, n, Dv]
    query, media_key, media_value, latent_key, latent_value, media_lengths,
    out: Tensor,  # [B, H, n, Dv]
    lse: Tensor,  # [B, H, n]
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first five arguments; one that is not needed has size 0."""
    key, value, start, end = _joined(query, media_key, media_value, latent_key, latent_value, media_lengths)
    joint = [needs[0], needs[1] or needs[3], needs[2] or needs[4], False]
    dq, dk, dv, _ = interval_attention_bwd(
        dout, None, query, key, value, start, end, out, lse, scale, None, 0, 0, joint
    )

    def part(gradient: Tensor, like: Tensor, first: int, need: bool) -> Tensor:
        if not need:
            return like.new_empty(0)
        part = gradient[:, :, first : first + like.shape[2]]
        return part.transpose(1, 2).contiguous().transpose(1, 2)

    latents = latent_key.shape[2]
    return (
        dq,
        part(dk, media_key, latents, needs[1]),
        part(dv, media_value, latents, needs[2]),
        part(dk, latent_key, 0, needs[3]),
        part(dv, latent_value, 0, needs[4]),
    )


def _joined(query, media_key, media_value, latent_key, latent_value, media_lengths):
    key, value = torch.cat([latent_key, media_key], 2), torch.cat([latent_value, media_value], 2)
    b, tq = query.shape[0], query.shape[2]
    if media_lengths is None:
        end = torch.full((b,), key.shape[2], device=query.device)
    else:
        end = latent_key.shape[2] + media_lengths.clamp(0, media_key.shape[2])
    end = end[:, None].expand(-1, tq)
    return key, value, torch.zeros_like(end), end
