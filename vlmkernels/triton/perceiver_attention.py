"""perceiver_attention (contract in ops/perceiver_attention.py): the attention kernels with two sources."""

from torch import Tensor

from vlmkernels.reference.perceiver_attention import perceiver_attention_bwd as reference_bwd
from vlmkernels.reference.perceiver_attention import perceiver_attention_fwd as reference_fwd
from vlmkernels.triton import _attention as attention
from vlmkernels.triton import _attention_bwd as attention_bwd
from vlmkernels.triton._attention import Source
from vlmkernels.triton._tiles import rows_contiguous


def _sources(query, media_key, media_value, latent_key, latent_value, media_lengths) -> tuple[Source, Source]:
    rows = (query.shape[0], query.shape[2])
    end = media_lengths[:, None].expand(rows) if media_lengths is not None else None
    media, latents = Source(media_key, media_value, None, end), Source(latent_key, latent_value, None, None)
    return media.rows_contiguous(), latents.rows_contiguous()


def perceiver_attention(
    query: Tensor,  # [B, H, n, Dh]
    media_key: Tensor,  # [B, Hkv, S, Dh]
    media_value: Tensor,  # [B, Hkv, S, Dv]
    latent_key: Tensor,  # [B, Hkv, L, Dh]
    latent_value: Tensor,  # [B, Hkv, L, Dv]
    media_lengths: Tensor | None,  # [B]
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, n, Dv], lse [B, H, n])."""
    if attention.unsupported(query, media_value):
        return reference_fwd(query, media_key, media_value, latent_key, latent_value, media_lengths, scale)
    media, latents = _sources(query, media_key, media_value, latent_key, latent_value, media_lengths)
    return attention.forward(query, media, latents, scale)


def perceiver_attention_bwd(
    dout: Tensor,  # [B, H, n, Dv]
    query: Tensor,  # [B, H, n, Dh]
    media_key: Tensor,  # [B, Hkv, S, Dh]
    media_value: Tensor,  # [B, Hkv, S, Dv]
    latent_key: Tensor,  # [B, Hkv, L, Dh]
    latent_value: Tensor,  # [B, Hkv, L, Dv]
    media_lengths: Tensor | None,  # [B]
    out: Tensor,  # [B, H, n, Dv]
    lse: Tensor,  # [B, H, n]
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first five inputs after dout; size 0 where not needed."""
    if attention.unsupported(query, media_value):
        return reference_bwd(
            dout, query, media_key, media_value, latent_key, latent_value, media_lengths, out, lse, scale,
            needs,
        )  # fmt: skip
    need_query, *need = needs
    media, latents = _sources(query, media_key, media_value, latent_key, latent_value, media_lengths)
    dout, query, out, lse = (*map(rows_contiguous, (dout, query, out)), lse.contiguous())
    dq, delta = query.new_empty(0), None
    if need_query:
        dq, delta = attention_bwd.query_gradient(dout, None, query, media, latents, out, lse, scale)
    elif need[0] or need[2]:
        delta = attention_bwd.row_delta(dout, out, None)
    dmedia = attention_bwd.key_gradients(dout, query, media, lse, delta, scale, need[:2])
    dlatents = attention_bwd.key_gradients(dout, query, latents, lse, delta, scale, need[2:])
    return dq, *dmedia, *dlatents
