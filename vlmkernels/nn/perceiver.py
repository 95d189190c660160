"""The Perceiver Resampler: a fixed number of latents attends to the visual tokens of each image or video.

    z = z + attention(norm z; norm [x; z])        z = z + feed_forward(norm z)        (depth times; norm)

Source: Alayrac et al. 2022, "Flamingo", section 3.1.1; the released code of open_flamingo 2.0.1 (MIT) for
choices that the paper leaves open. Parameter names are open_flamingo's; `families.py` has those of others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels._modules import is_exactly, must_be_called
from vlmkernels.nn import _layers as layers


class PerceiverAttention(nn.Module):
    """One attention layer of the resampler."""

    def __init__(
        self, dim: int, *, dim_head: int, heads: int, kv_heads: int, norm: str, eps: float, qk_norm: bool
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.norm_media = layers.NORMS[norm](dim, eps=eps)
        self.norm_latents = layers.NORMS[norm](dim, eps=eps)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.q_norm = layers.NORMS[norm](dim_head, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = layers.NORMS[norm](dim_head, eps=eps) if qk_norm else nn.Identity()

    def forward(
        self,
        latents: Tensor,  # [N or 1, n, D]
        media: Tensor | tuple[Tensor, Tensor],  # [N, S, D], or keys and values [N, S, Hkv, Dh] each
        media_lengths: Tensor | None,  # [N]
    ) -> Tensor:  # [N, n, D]
        """The branch, without the residual; latents with a batch of 1 are shared by all images."""
        if isinstance(media, Tensor):
            (both,) = layers.norm_linear(media, self.norm_media, self.to_kv)
            media_key, media_value = both.unflatten(-1, (2, self.kv_heads, self.dim_head)).unbind(2)
        else:
            media_key, media_value = media
        query, both = layers.norm_linear(latents, self.norm_latents, self.to_q, self.to_kv)
        query = layers.head_norm(self.q_norm, query.unflatten(-1, (self.heads, self.dim_head)))
        key, value = both.unflatten(-1, (2, self.kv_heads, self.dim_head)).unbind(2)
        key, media_key = layers.head_norm(self.k_norm, key), layers.head_norm(self.k_norm, media_key)
        query, key, value = (
            t.transpose(1, 2).expand(media_key.shape[0], -1, -1, -1) for t in (query, key, value)
        )
        out = vlmkernels.perceiver_attention(
            query,
            media_key.transpose(1, 2),
            media_value.transpose(1, 2),
            key,
            value,
            media_lengths=media_lengths,
        )
        return self.to_out(out.transpose(1, 2).flatten(2))


class PerceiverResampler(nn.Module):
    """Maps the visual tokens of each image, or of the frames of a video, to `num_latents` tokens.

    Arguments and parameter names are those of open_flamingo's class; further arguments support the other
    families (`vlmkernels.nn.families`). The media are normalised once, and the keys and values of all layers
    come from one matrix product, with the layers' norms folded into its weights.

    Args:
        dim: width of the visual tokens and the latents.
        depth, dim_head, heads, num_latents: layers, head width, query heads, latents.
        kv_heads: heads of keys and values, `heads` when None.
        max_num_media, max_num_frames: number of learned embeddings of the position of an image in the sample
            and of a frame in the video; no embeddings when None.
        max_num_patches: the same of the place of a visual token in its frame. Attention has no order: without
            them a place is known only as far as the encoder's tokens hold it. The paper has none.
        ff_mult, ff_dim: hidden width of the feed-forward layers, ``dim * ff_mult`` unless given as `ff_dim`.
        activation: "gelu", "relu", "squared_relu" (Flamingo's paper) or "swiglu".
        norm, eps: "layernorm" or "rmsnorm".
        qk_norm: a norm of the same type over each head of the queries and keys.

    Raises:
        ValueError: naming every invalid argument.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        max_num_patches: int | None = None,
        ff_mult: float = 4,
        ff_dim: int | None = None,
        activation: str = "gelu",
        norm: str = "layernorm",
        eps: float = 1e-5,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        faults = layers.option_faults(
            dim=dim, depth=depth, dim_head=dim_head, heads=heads, kv_heads=kv_heads, num_latents=num_latents,
            max_num_media=max_num_media or 1, max_num_frames=max_num_frames or 1,
            max_num_patches=max_num_patches or 1, ff_mult=ff_mult, ff_dim=ff_dim or 1,
            activation=activation, norm=norm, eps=eps,
        )  # fmt: skip
        if faults:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(faults))
        self.dim, self.num_latents = dim, num_latents
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim)) if max_num_frames else None
        self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim)) if max_num_media else None
        self.patch_embs = nn.Parameter(torch.randn(max_num_patches, dim)) if max_num_patches else None
        hidden = ff_dim or int(dim * ff_mult)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = PerceiverAttention(
                dim, dim_head=dim_head, heads=heads, kv_heads=kv_heads, norm=norm, eps=eps, qk_norm=qk_norm
            )
            feed_forward = layers.FeedForward(dim, hidden, activation=activation, norm=norm, eps=eps)
            self.layers.append(nn.ModuleList([attention, feed_forward]))
        self.norm = layers.NORMS[norm](dim, eps=eps)

    def forward(
        self,
        x: Tensor,  # [B, T, F, v, D]
        media_lengths: Tensor | None = None,  # [B, T]
    ) -> Tensor:  # [B, T, n, D]
        """The latents of each image.

        Args:
            x: ``[B, T, F, v, D]``, v visual tokens of F frames of T images; ``[B, T, v, D]`` for one frame,
                ``[B, v, D]`` for one image.
            media_lengths: int ``[B, T]``, number of valid tokens among an image's F v; with 0 the latents
                attend only to themselves. All when None.

        Raises:
            ValueError: naming every invalid argument.
        """
        x = self._check(x, media_lengths)
        images, frames, patches = x.shape[1:4]
        if self.frame_embs is not None:
            x = x + self.frame_embs[:frames, None]
        if self.media_time_embs is not None:
            x = x + self.media_time_embs[:images, None]
        if self.patch_embs is not None:
            x = x + self.patch_embs[:patches]
        lengths = None if media_lengths is None else media_lengths.flatten()
        latents = self.latents[None]
        media = self._media_of_layers(x.flatten(0, 1).flatten(1, 2))
        for (attention, feed_forward), seen in zip(self._pairs(), media, strict=True):
            latents = latents + attention(latents, seen, lengths)
            latents = layers.add_feed_forward(latents, feed_forward)
        return self.norm(latents).unflatten(0, x.shape[:2])

    def _media_of_layers(
        self,
        x: Tensor,  # [N, S, D]
    ) -> list[Any]:  # for each layer two [N, S, Hkv, Dh], or x
        """The media for each layer: for many tokens, keys and values from one product for all layers.

        With x^ the media normalised without gains: norm_l(x) W_l^T = x^ (W_l diag(g_l))^T + W_l b_l
        """
        attentions = [attention for attention, _ in self._pairs()]
        foldable = all(
            is_exactly(a, PerceiverAttention)
            and not must_be_called(a)
            and layers.norm_linear_can_be_fused(a.norm_media, a.to_kv)
            for a in attentions
        )
        foldable = foldable and len({(type(a.norm_media), a.norm_media.eps) for a in attentions}) == 1
        if (
            not foldable or x.shape[:-1].numel() < attentions[0].to_kv.out_features
        ):  # few tokens: folding would cost more
            return [x] * len(attentions)
        norms = [a.norm_media for a in attentions]
        weights = [a.to_kv.weight for a in attentions]
        bias = None
        if isinstance(norms[0], nn.LayerNorm):
            x = F.layer_norm(x, (self.dim,), eps=norms[0].eps)
            bias = torch.cat([w @ norm.bias for w, norm in zip(weights, norms, strict=True)])
        else:
            x = F.rms_norm(x, (self.dim,), eps=norms[0].eps)
        weight = torch.cat([w * norm.weight for w, norm in zip(weights, norms, strict=True)])
        heads = attentions[0].kv_heads, attentions[0].dim_head
        parts = F.linear(x, weight, bias).unflatten(-1, (2 * len(norms), *heads)).unbind(2)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def _pairs(self) -> list[Any]:
        """Attention and feed-forward of each layer."""
        return list(self.layers)

    def _check(self, x: Tensor, media_lengths: Tensor | None) -> Tensor:
        """x as [B, T, F, v, D]."""
        got = tuple(x.shape)
        if x.dim() == 3:
            x = x[:, None, None]
        elif x.dim() == 4:
            x = x[:, :, None]
        faults = []
        if x.dim() != 5 or x.shape[-1] != self.dim:
            faults.append(
                f"x must be [B, T, F, v, D], [B, T, v, D] or [B, v, D] with D = {self.dim}, got {got}"
            )
        else:
            limits = (
                ("images", 1, self.media_time_embs),
                ("frames", 2, self.frame_embs),
                ("visual tokens", 3, self.patch_embs),
            )
            for what, where, table in limits:
                if table is not None and x.shape[where] > len(table):
                    faults.append(f"x has {x.shape[where]} {what}, there are embeddings for {len(table)}")
            if media_lengths is not None and (
                media_lengths.numel() != x.shape[0] * x.shape[1]
                or media_lengths.dtype not in (torch.int32, torch.int64)
            ):
                faults.append(
                    f"media_lengths must be int32 or int64 [B, T] = {tuple(x.shape[:2])}, "
                    f"got {media_lengths.dtype} {tuple(media_lengths.shape)}"
                )
        if faults:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(faults))
        return x
