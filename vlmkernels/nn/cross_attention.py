"""Cross-attention of text to images: Flamingo's masked cross-attention and the gated block around it.

    h = x + tanh(attn_gate) attention(norm x, media)        out = h + tanh(ff_gate) feed_forward(norm h)

Source: Alayrac et al. 2022, "Flamingo", section 3.1.2 and 3.1.3; the released code of open_flamingo 2.0.1
(MIT) for choices that the paper leaves open. Parameter names are open_flamingo's; `families.py` has the
names and options of the other families.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals as build
from vlmkernels._arguments import product_dtype
from vlmkernels._modules import is_exactly, must_be_called
from vlmkernels.intervals import Bounds
from vlmkernels.nn import _layers as layers

if TYPE_CHECKING:
    from vlmkernels.nn.media_cache import MediaCache


class MaskedCrossAttention(nn.Module):
    """The attention branch: text rows attend to the tokens of the last image before them, or of all of them.

    Arguments and parameter names are those of open_flamingo's class; further keyword-only arguments support
    the other families (`vlmkernels.nn.families`).

    Args:
        dim: width of the text; dim_visual: width of the media, `dim` when None.
        heads, dim_head, kv_heads: query heads, their width, heads of keys and values (`heads` when None).
        only_attend_immediate_media: a row attends to the last image before it only, otherwise to all of them.
        norm, eps: "layernorm" or "rmsnorm" of the text; the media are not normalised.
        qk_norm: a norm of the same type over each head of the queries and keys.
        empty_row: attention output of a row that attends to no image. "zero"; "uniform", the mean of all
            values, as in open_flamingo (but zero before the first image with `only_attend_immediate_media`,
            also as in open_flamingo); "all", attention to all media, as in transformers' mllama.

    Raises:
        ValueError: naming every invalid argument.
    """

    def __init__(
        self,
        dim: int,
        dim_visual: int | None = None,
        *,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        only_attend_immediate_media: bool = True,
        norm: str = "layernorm",
        eps: float = 1e-5,
        qk_norm: bool = False,
        empty_row: str = "zero",
    ) -> None:
        super().__init__()
        dim_visual, kv_heads = dim_visual or dim, kv_heads or heads
        faults = layers.option_faults(
            dim=dim, dim_visual=dim_visual, dim_head=dim_head, heads=heads, kv_heads=kv_heads, norm=norm,
            eps=eps, empty_row=empty_row,
        )  # fmt: skip
        if faults:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(faults))
        self.dim, self.heads, self.kv_heads, self.dim_head = dim, heads, kv_heads, dim_head
        self.only_attend_immediate_media = only_attend_immediate_media
        self.empty_row = empty_row
        self.norm = layers.NORMS[norm](dim, eps=eps)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.q_norm = layers.NORMS[norm](dim_head, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = layers.NORMS[norm](dim_head, eps=eps) if qk_norm else nn.Identity()

    @property
    def attend(self) -> str:
        """The argument `attend` of `vlmkernels.intervals.media`."""
        return "immediate" if self.only_attend_immediate_media else "all_previous"

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor | None = None,  # [B, M, n, Dv]
        media_locations: Tensor | None = None,  # [B, T] bool
        use_cached_media: bool = False,
        *,
        num_media: Tensor | None = None,  # [B]
        intervals: Bounds | None = None,  # two [B, T] or [T]
        mask: Tensor | None = None,  # [B, T, M] or [B, T, M n] bool
        cache: MediaCache | None = None,
    ) -> Tensor:  # [B, T, D]
        """The branch, without residual and gate. Arguments: see `GatedCrossAttentionBlock.forward`."""
        out, _ = self.attention(
            x, media, media_locations, use_cached_media,
            num_media=num_media, intervals=intervals, mask=mask, cache=cache,
        )  # fmt: skip
        return self.to_out(out)

    def keys_values(
        self,
        media: Tensor,  # [B, M, n, Dv]
    ) -> tuple[Tensor, Tensor]:  # each [B, Hkv, M n, Dh]
        """Keys and values of images, which `MediaCache` stores."""
        both = self.to_kv(media.flatten(1, 2)).unflatten(-1, (2, self.kv_heads, self.dim_head))
        key, value = both.unbind(2)  # each [B, M n, Hkv, Dh]
        return layers.head_norm(self.k_norm, key).transpose(1, 2), value.transpose(1, 2)

    def attention(
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor | None,
        media_locations: Tensor | None,
        use_cached_media: bool,
        *,
        num_media: Tensor | None,
        intervals: Bounds | None,
        mask: Tensor | None,
        cache: MediaCache | None,
    ) -> tuple[Tensor, Tensor | None]:  # [B, T, H Dh], [B, T] or [T]
        """The input of `to_out`, and which rows attend to no image (None: every row attends to all media)."""
        self._check(x, media, media_locations, use_cached_media, num_media, intervals, mask, cache)
        if cache is not None:
            key, value = cache.keys_values(self)
        else:
            assert media is not None
            key, value = self.keys_values(media)
        seen = self._intervals(x, media, media_locations, use_cached_media, num_media, intervals, mask, cache)
        (query,) = layers.norm_linear(x, self.norm, self.to_q)
        query = query.unflatten(-1, (self.heads, self.dim_head))
        query = layers.head_norm(self.q_norm, query).transpose(1, 2)
        if mask is not None:
            out, empty = self._by_mask(query, key, value, mask)
        else:
            out, empty = self._by_intervals(query, key, value, seen)
        return out.transpose(1, 2).flatten(2), empty

    def empty_rows(
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor | None,
        media_locations: Tensor | None,
        use_cached_media: bool,
        *,
        num_media: Tensor | None,
        intervals: Bounds | None,
        mask: Tensor | None,
        cache: MediaCache | None,
    ) -> Tensor | None:  # [B, T] or [T]
        """Which rows attend to no image; None: every row attends to all media."""
        self._check(x, media, media_locations, use_cached_media, num_media, intervals, mask, cache)
        seen = self._intervals(x, media, media_locations, use_cached_media, num_media, intervals, mask, cache)
        if mask is not None:
            return mask.sum(-1) == 0
        if cache is not None:
            return _empty(seen, cache.num_slots * cache.tokens_per_media)
        assert media is not None
        return _empty(seen, media.shape[1] * media.shape[2])

    def _intervals(
        self,
        x: Tensor,
        media: Tensor | None,
        media_locations: Tensor | None,
        use_cached_media: bool,
        num_media: Tensor | None,
        intervals: Bounds | None,
        mask: Tensor | None,
        cache: MediaCache | None,
    ) -> Bounds | None:
        """The intervals that the rows attend to; None with a mask, or if they attend to all media."""
        if cache is not None and intervals is None and mask is None:
            return cache.intervals_for(x)
        if media is None or media_locations is None:
            return intervals
        time = build.text_time(media_locations)
        if use_cached_media:
            time = media_locations.sum(1, dtype=torch.int32)[:, None].expand(x.shape[:2])
        most = media.shape[1] if num_media is None else num_media
        return build.media(time, media.shape[2], most, attend=self.attend)

    def _by_intervals(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Bounds | None
    ) -> tuple[Tensor, Tensor | None]:
        tokens = key.shape[2]
        empty = _empty(seen, tokens)
        if seen is None:
            seen = build.full(query.shape[2], tokens, device=query.device)
        elif empty is not None and self.empty_row == "all":
            seen = seen[0].where(~empty, 0), seen[1].where(~empty, tokens)
        out = vlmkernels.interval_attention(query, key, value, seen)
        if empty is not None and self.empty_row == "uniform":
            rows = empty & (seen[0] > 0) if self.only_attend_immediate_media else empty
            out = torch.where(rows[..., None, :, None], self._mean(value, out), out)
        return out, empty

    def _by_mask(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Masks that are not intervals: scaled dot-product attention with the mask, of size T x M n."""
        if mask.shape[-1] != key.shape[2]:
            mask = mask.repeat_interleave(key.shape[2] // mask.shape[-1], -1)
        empty = mask.sum(-1) == 0
        dtype = product_dtype(query)
        out = F.scaled_dot_product_attention(
            query.to(dtype), key.to(dtype), value.to(dtype),
            attn_mask=(mask | empty[..., None])[:, None],
            enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        if self.empty_row != "all":
            instead = self._mean(value, out) if self.empty_row == "uniform" else 0
            out = torch.where(empty[:, None, :, None], instead, out)
        return out, empty

    def _mean(self, value: Tensor, like: Tensor) -> Tensor:  # [B, H, 1, Dh]
        mean = value.mean(2, keepdim=True).to(like.dtype)
        return mean.repeat_interleave(self.heads // self.kv_heads, 1)

    def _check(
        self,
        x: Tensor,
        media: Tensor | None,
        media_locations: Tensor | None,
        use_cached_media: bool,
        num_media: Tensor | None,
        intervals: Bounds | None,
        mask: Tensor | None,
        cache: MediaCache | None,
    ) -> None:
        faults = []
        if x.dim() != 3 or x.shape[-1] != self.dim:
            faults.append(f"x must be [B, T, {self.dim}], got {tuple(x.shape)}")
        if (media is None) == (cache is None):
            faults.append("exactly one of media and cache must be given")
        if media is not None and (media.dim() != 4 or media.shape[0] != x.shape[0]):
            faults.append(f"media must be [B = {x.shape[0]}, M, n, Dv], got {tuple(media.shape)}")
        ways = {"media_locations": media_locations, "intervals": intervals, "mask": mask}
        given = [name for name, way in ways.items() if way is not None]
        if len(given) > 1:
            faults.append(
                f"at most one of media_locations, intervals and mask may be given, got {' and '.join(given)}"
            )
        if media_locations is not None:
            if cache is not None:
                faults.append("media_locations must be passed to cache.step() if there is a cache")
            wanted = (x.shape[0],) if use_cached_media else tuple(x.shape[:2])
            if media_locations.dim() != 2 or tuple(media_locations.shape[: len(wanted)]) != wanted:
                faults.append(
                    f"media_locations must be [B, T] = {tuple(x.shape[:2])} (any T with use_cached_media), "
                    f"got {tuple(media_locations.shape)}"
                )
        elif num_media is not None:
            faults.append("num_media requires media_locations")
        if mask is not None and not faults:
            images = media.shape[1] if media is not None else cache.num_slots  # type: ignore[union-attr]
            each = media.shape[2] if media is not None else cache.tokens_per_media  # type: ignore[union-attr]
            last = (images, images * each)
            if mask.dtype != torch.bool or mask.shape[:-1] != x.shape[:2] or mask.shape[-1] not in last:
                faults.append(
                    f"mask must be bool [B, T, M or M n] = {(*x.shape[:2], last)}, "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )
        if faults:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(faults))


def _empty(seen: Bounds | None, tokens: int) -> Tensor | None:
    """Which rows attend to none of the tokens; None: every row attends to all of them."""
    return None if seen is None else seen[1].clamp_max(tokens) <= seen[0].clamp_min(0)


class GatedCrossAttentionBlock(nn.Module):
    """Flamingo's GATED XATTN-DENSE: cross-attention and feed-forward, each with a tanh gate initialised to 0.

    Arguments and parameter names are those of open_flamingo's class. Beyond `MaskedCrossAttention`'s:

    Args:
        ff_mult, ff_dim: hidden width of the feed-forward layer, ``dim * ff_mult`` unless given as `ff_dim`.
        activation: "gelu", "relu", "squared_relu" (Flamingo's paper) or "swiglu".
        gate: "scalar" or "vector", one gate or one per channel.
        ffn_on_empty: whether the feed-forward layer applies to rows that attend to no image; otherwise such a
            row passes unchanged, as in Meta's mllama.
        recompute_ffn: recompute the pre-activation of the feed-forward layer in the backward instead of
            saving it: less memory, one more matrix product.

    Raises:
        ValueError: naming every invalid argument.
    """

    def __init__(
        self,
        dim: int,
        dim_visual: int | None = None,
        *,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        ff_mult: float = 4,
        ff_dim: int | None = None,
        only_attend_immediate_media: bool = True,
        activation: str = "gelu",
        norm: str = "layernorm",
        eps: float = 1e-5,
        qk_norm: bool = False,
        gate: str = "scalar",
        empty_row: str = "zero",
        ffn_on_empty: bool = True,
        recompute_ffn: bool = False,
    ) -> None:
        super().__init__()
        faults = layers.option_faults(
            dim=dim, dim_visual=dim_visual or dim, dim_head=dim_head, heads=heads,
            kv_heads=kv_heads or heads, ff_mult=ff_mult, ff_dim=ff_dim or 1, activation=activation, norm=norm,
            eps=eps, gate=gate, empty_row=empty_row,
        )  # fmt: skip
        if faults:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(faults))
        self.attn = MaskedCrossAttention(
            dim, dim_visual, dim_head=dim_head, heads=heads, kv_heads=kv_heads,
            only_attend_immediate_media=only_attend_immediate_media, norm=norm, eps=eps, qk_norm=qk_norm,
            empty_row=empty_row,
        )  # fmt: skip
        self.attn_gate = nn.Parameter(torch.zeros(dim if gate == "vector" else 1))
        hidden = ff_dim or int(dim * ff_mult)
        self.ff = layers.FeedForward(dim, hidden, activation=activation, norm=norm, eps=eps)
        self.ff_gate = nn.Parameter(torch.zeros(dim if gate == "vector" else 1))
        self.ffn_on_empty = ffn_on_empty
        self.recompute_ffn = recompute_ffn

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor | None = None,  # [B, M, n, Dv]
        media_locations: Tensor | None = None,  # [B, T] bool
        use_cached_media: bool = False,
        *,
        num_media: Tensor | None = None,  # [B]
        intervals: Bounds | None = None,  # two [B, T] or [T]
        mask: Tensor | None = None,  # [B, T, M] or [B, T, M n] bool
        cache: MediaCache | None = None,
    ) -> Tensor:  # [B, T, D]
        """The residual stream after both branches.

        Without `media_locations`, `intervals`, `mask` and `cache` every row attends to all media.

        Args:
            x: text, ``[B, T, D]``.
            media: ``[B, M, n, Dv]``, n tokens of each of M images; or None with a `cache`.
            media_locations: bool ``[B, T]``, True at the image tokens; an image token attends to its own
                image.
            use_cached_media: every row comes after the last of `media_locations`, whose length may differ.
            num_media: int ``[B]``, how many of the M images a sample has; the others are ignored.
            intervals: ``(start, end)``, the media tokens that row i attends to, over all images; computed
                once per forward by `vlmkernels.intervals.media` and shared by the blocks of a model.
            mask: bool, the images or media tokens that row i attends to. The only argument that is not an
                interval: it uses scaled dot-product attention with a mask of size T x M n.
            cache: keys, values and intervals come from a `MediaCache`.

        Raises:
            ValueError: naming every invalid argument.
        """
        given: Any = (x, media, media_locations, use_cached_media)
        ways: Any = {"num_media": num_media, "intervals": intervals, "mask": mask, "cache": cache}
        branch = empty = None
        if is_exactly(self.attn, MaskedCrossAttention) and not must_be_called(self.attn):
            out, empty = self.attn.attention(*given, **ways)
            branch = (out, self.attn.to_out, self.attn_gate)
        else:
            if not self.ffn_on_empty:
                empty = self.attn.empty_rows(*given, **ways)
            x = layers.add_gated(x, self.attn(*given, **ways), self.attn_gate)
        row_mask = None
        if not self.ffn_on_empty and empty is not None:
            row_mask = (~empty).expand(x.shape[:2])
        return layers.add_feed_forward(
            x, self.ff, self.ff_gate, branch=branch, row_mask=row_mask, recompute=self.recompute_ffn
        )
