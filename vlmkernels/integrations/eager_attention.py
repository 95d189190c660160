"""Attention modules that compute the products and the softmax explicitly, recognised by name.

open_flamingo's MaskedCrossAttention and PerceiverAttention, the Perceiver of IDEFICS, VisualBERT and ALIGN.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels._modules import is_exactly, must_be_called
from vlmkernels.integrations import _masks
from vlmkernels.integrations._swap import qualified_name
from vlmkernels.integrations.attention import AttentionRule, attend


class _Named(AttentionRule):
    patch_name: ClassVar[str]

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return qualified_name(type(module)) == cls.patch_name


def _heads(x: Tensor, heads: int) -> Tensor:  # [B, T, H Dh] -> [B, H, T, Dh]
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:  # [B, H, T, Dh] -> [B, T, H Dh]
    return x.transpose(1, 2).flatten(2)


def _perceiver(*projected: Tensor, heads: int, scale: float) -> Tensor:  # [B, H, n, Dh]
    """Attention of projected queries, media keys and values, latent keys and values, each [B, T, H Dh]."""
    query, *sources = (_heads(x, heads) for x in projected)
    return vlmkernels.perceiver_attention(query, *sources, scale=scale)


def _can_be_split(*projections: nn.Module) -> bool:
    """Whether rows may be projected by two calls instead of one: no hooks, and rows do not interact."""
    return all(is_exactly(p, nn.Linear) and not must_be_called(p) for p in projections)


class FlamingoCrossAttention(_Named):
    """open_flamingo's MaskedCrossAttention: the images that a text row attends to are an interval of keys.

    A row whose images are all missing attends to all keys equally, since all its logits are the same number;
    before the first image, with `only_attend_immediate_media`, its result is zero.
    """

    patch_name = "open_flamingo.src.helpers.MaskedCrossAttention"

    heads: int
    scale: float
    only_attend_immediate_media: bool
    norm: nn.Module
    to_q: nn.Module
    to_kv: nn.Module
    to_out: nn.Module

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, T, D]
        media: Tensor,  # [B, M, n, Dv]
        media_locations: Tensor | None = None,  # [B, T] bool
        use_cached_media: bool = False,
    ) -> Tensor:  # [B, T, D]
        if not use_cached_media and (media_locations is None or media_locations.shape[1] != x.shape[1]):
            return super().forward(x, media, media_locations, use_cached_media)
        query = _heads(self.to_q(self.norm(x)), self.heads)
        key, value = (_heads(kv, self.heads) for kv in self.to_kv(media.flatten(1, 2)).chunk(2, -1))
        if media_locations is None:
            return self.to_out(_merged(attend(query, key, value, scale=self.scale)))
        if use_cached_media:
            time = media_locations.count_nonzero(1)[:, None].expand(x.shape[:2])
        else:
            time = intervals.text_time(media_locations)
        attend_to = "immediate" if self.only_attend_immediate_media else "all_previous"
        seen = intervals.media(time, media.shape[2], media.shape[1], attend=attend_to)
        out = attend(query, key, value, seen, scale=self.scale)
        uniform = seen.end <= seen.start  # [B, T]
        if self.only_attend_immediate_media:
            uniform = uniform & (time > 0)
        mean = value.mean(2, keepdim=True).to(out.dtype)
        return self.to_out(_merged(torch.where(uniform[:, None, :, None], mean, out)))


class FlamingoPerceiverAttention(_Named):
    """open_flamingo's PerceiverAttention, without the concatenation of media and latents."""

    patch_name = "open_flamingo.src.helpers.PerceiverAttention"
    patch_runs = "vlmkernels.perceiver_attention"

    heads: int
    scale: float
    norm_media: nn.Module
    norm_latents: nn.Module
    to_q: nn.Module
    to_kv: nn.Module
    to_out: nn.Module

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, M, S, D]
        latents: Tensor,  # [B, M, n, D]
    ) -> Tensor:  # [B, M, n, D]
        if not _can_be_split(self.to_kv):
            return super().forward(x, latents)
        shape = latents.shape
        media, latents = self.norm_media(x).flatten(0, 1), self.norm_latents(latents).flatten(0, 1)
        projected = (self.to_q(latents), *self.to_kv(media).chunk(2, -1), *self.to_kv(latents).chunk(2, -1))
        out = _perceiver(*projected, heads=self.heads, scale=self.scale)
        return self.to_out(_merged(out).unflatten(0, shape[:2]))


class IdeficsPerceiverAttention(_Named):
    """That of transformers' IDEFICS, with its norms of queries and keys."""

    patch_name = "transformers.models.idefics.perceiver.IdeficsPerceiverAttention"
    patch_runs = "vlmkernels.perceiver_attention"

    n_heads: int
    qk_scale: float
    qk_layer_norms: bool
    context_layer_norm: nn.Module
    latents_layer_norm: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    output_proj: nn.Module

    def forward(  # type: ignore[override]
        self,
        context: Tensor,  # [B, S, D]
        latents: Tensor,  # [B, n, D]
    ) -> Tensor:  # [B, n, D]
        if self.qk_layer_norms or not _can_be_split(self.k_proj, self.v_proj):
            return super().forward(context, latents)
        context, latents = self.context_layer_norm(context), self.latents_layer_norm(latents)
        out = _perceiver(
            self.q_proj(latents), self.k_proj(context), self.v_proj(context), self.k_proj(latents),
            self.v_proj(latents), heads=self.n_heads, scale=self.qk_scale,
        )  # fmt: skip
        return self.output_proj(_merged(out))


class _BertAttention(_Named):
    num_attention_heads: int
    dropout: nn.Dropout
    query: nn.Module
    key: nn.Module
    value: nn.Module

    def attention_by_intervals(
        self,
        hidden_states: Tensor,  # [B, T, D]
        attention_mask: Tensor | None,  # [B, 1, 1 or T, T], added to the logits
    ) -> Tensor | None:  # [B, T, D], None where it would not be exact
        seen, tokens = None, hidden_states.shape[1]
        if must_be_called(self.dropout) or (self.training and self.dropout.p > 0):
            return None
        if hidden_states.numel() == 0:
            return None
        if attention_mask is not None:
            seen = _masks.intervals_of(
                attention_mask, (hidden_states.shape[0], self.num_attention_heads, tokens, tokens)
            )
            if seen is None:
                return None
        query, key, value = (
            _heads(projection(hidden_states), self.num_attention_heads)
            for projection in (self.query, self.key, self.value)
        )
        return _merged(attend(query, key, value, seen))


class VisualBertAttention(_BertAttention):
    """transformers' VisualBertSelfAttention; calls that request the attention weights run its own code."""

    patch_name = "transformers.models.visual_bert.modeling_visual_bert.VisualBertSelfAttention"

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        out = None if output_attentions else self.attention_by_intervals(hidden_states, attention_mask)
        if out is None:
            return super().forward(hidden_states, attention_mask, output_attentions)
        return (out,)


class AlignAttention(_BertAttention):
    """transformers' AlignTextSelfAttention, for which transformers has no "sdpa".

    Its caller discards the attention weights. They are requested by a hook on the module, as
    ``output_attentions=True`` registers it; the module's own code then runs.
    """

    patch_name = "transformers.models.align.modeling_align.AlignTextSelfAttention"

    config: Any

    @classmethod
    def patch_matches(cls, module: Any) -> bool:
        return super().patch_matches(module) and module.config._attn_implementation == "eager"

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        out = None
        if not self._forward_hooks and self.config._attn_implementation == "eager":
            out = self.attention_by_intervals(hidden_states, attention_mask)
        if out is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return out, None


class UnknownAttention(AttentionRule):
    """Other modules with attention in their name, so that the report is complete."""

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return (
            "Attention" in type(module).__name__
            and any(True for _ in module.parameters(recurse=True))
            and not any(
                "Attention" in type(child).__name__ for child in module.modules() if child is not module
            )
        )

    @classmethod
    def patch_refuses(cls, module: nn.Module) -> str | None:
        return "computes attention itself, with products and a softmax"


EAGER_ATTENTION: tuple[type[AttentionRule], ...] = (
    FlamingoCrossAttention,
    FlamingoPerceiverAttention,
    IdeficsPerceiverAttention,
    VisualBertAttention,
    AlignAttention,
)
