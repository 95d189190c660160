"""Latents attend to media tokens and to themselves: one softmax over two sources of keys."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.ops import _attention as attention
from vlmkernels.reference._attention import empty_heads_merged
from vlmkernels.reference.perceiver_attention import perceiver_attention_bwd, perceiver_attention_fwd


@arguments.public
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
    """Attention over media tokens and latents together, without concatenating them.

    The attention of Flamingo's Perceiver Resampler (Alayrac et al. 2022, appendix A.1.1), whose keys and
    values are those of the media and of the latents; the softmax over both has one running maximum.

    Args:
        query: ``[B, H, n, Dh]``, any strides.
        media_key, media_value: ``[B, Hkv, S, Dh]`` and ``[B, Hkv, S, Dv]``, H a multiple of Hkv.
        latent_key, latent_value: ``[B, Hkv, L, Dh]`` and ``[B, Hkv, L, Dv]``.
        media_lengths: int32 or int64 ``[B]``, how many of the S media tokens are attended to, clipped to
            [0, S]; with 0 only the latents are. All when None.
        scale: of the similarities, ``1 / sqrt(Dh)`` when None.

    Returns:
        ``[B, H, n, Dv]`` in the dtype of the inputs, in memory ``[B, n, H, Dv]``; 0 where there are
        no keys (no media and L = 0). Softmax and sums run in float32 (float64 for float64 inputs).

    Raises:
        ValueError: naming every invalid argument.
    """
    keys = {"media_key": media_key, "latent_key": latent_key}
    values = {"media_value": media_value, "latent_value": latent_value}
    faults = attention.attention_faults(query, keys, values)
    if media_lengths is not None and query.dim() == 4:
        fits = media_lengths.shape == query.shape[:1] and media_lengths.device == query.device
        if not fits or media_lengths.dtype not in (torch.int32, torch.int64):
            faults.append(
                f"media_lengths must be int32 or int64 [B] = ({query.shape[0]},) on {query.device}, got "
                f"{media_lengths.dtype} {tuple(media_lengths.shape)} on {media_lengths.device}"
            )
    if faults:
        raise ValueError("perceiver_attention: " + "; ".join(faults))
    scale = attention.scale_of(scale, query)
    return _op(query, media_key, media_value, latent_key, latent_value, media_lengths, scale)[0]


def _fake(query, media_key, media_value, latent_key, latent_value, media_lengths, scale):
    b, h, n, _ = query.shape
    lse = query.new_empty((b, h, n), dtype=torch.promote_types(query.dtype, torch.float32))
    return empty_heads_merged(query, (b, h, n, media_value.shape[-1])), lse


def _fake_bwd(
    dout, query, media_key, media_value, latent_key, latent_value, media_lengths, out, lse, scale, needs
):
    return attention.empty_grads((query, media_key, media_value, latent_key, latent_value), needs)


def _flops(query, media_key, media_value, latent_key, *_, **__):
    return attention.flops(query, media_key[2] + latent_key[2], media_value[3])


def _flops_bwd(dout, query, media_key, media_value, latent_key, *rest, **_):
    need_query, need_media_key, need_media_value, need_latent_key, need_latent_value = rest[-1]
    sources = (
        (media_key, need_media_key, need_media_value),
        (latent_key, need_latent_key, need_latent_value),
    )
    need_logits = need_query or need_media_key or need_latent_key
    return sum(
        attention.flops_bwd(
            query, key[2], media_value[3], need_query=need_query, need_key=need_key, need_value=need_value,
            need_logits=need_logits,
        )
        for key, need_key, need_value in sources
    )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, needs, dout, _):
    grads = _bwd(dout, *ctx.saved_tensors, ctx.scale, [needs[name] for name in _OPERANDS])
    return dict(zip(_OPERANDS, grads, strict=True))


_OPERANDS = ("query", "media_key", "media_value", "latent_key", "latent_value")


_INPUTS = "Tensor query, Tensor media_key, Tensor media_value, Tensor latent_key, Tensor latent_value,"
_INPUTS += " Tensor? media_lengths"
_op = define(
    f"perceiver_attention({_INPUTS}, float scale) -> (Tensor out, Tensor lse)",
    reference=perceiver_attention_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_OPERANDS,
)
_bwd = define(
    f"perceiver_attention_bwd(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, float scale, bool[5] needs)"
    " -> (Tensor dquery, Tensor dmedia_key, Tensor dmedia_value, Tensor dlatent_key, Tensor dlatent_value)",
    reference=perceiver_attention_bwd,
    fake=_fake_bwd,
    flops=_flops_bwd,
)

if TRITON:
    from vlmkernels.triton import perceiver_attention as _cuda

    kernel("perceiver_attention", "CUDA", _cuda.perceiver_attention, "Triton")
    kernel("perceiver_attention_bwd", "CUDA", _cuda.perceiver_attention_bwd, "Triton")
