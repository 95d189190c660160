"""Keys and values of images, computed once for all layers and reused at every decoding step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels import intervals as build
from vlmkernels.intervals import Intervals
from vlmkernels.nn.cross_attention import MaskedCrossAttention
from vlmkernels.nn.kv_cache import KVCache


class MediaCache:
    """The images of a batch as keys and values of the cross-attention layers of a model.

        cache = MediaCache(blocks, media)          # one product per layer, once
        cache.step(media_locations)                # which images the rows of this chunk of text attend to
        for block in blocks:
            x = block(x, cache=cache)
        cache.step()                               # decoding: one more row, no new image
        ...

    `step` counts the image tokens of the text, so that prefilling in chunks of any size gives the result of a
    single forward. Everything stays on the device of `media`, without synchronisation.

    Args:
        blocks: the `GatedCrossAttentionBlock` or `MaskedCrossAttention` modules of the model.
        media: ``[B, M, n, Dv]``.
        num_media: int ``[B]``, how many of the M images a sample has; all when None.

    Attributes:
        seen: int32 ``[B]``, image tokens in the text so far.
        num_media: images of each sample, an int if all have the same number, else int32 ``[B]``.
        num_slots, tokens_per_media: M and n.

    Raises:
        ValueError: naming every invalid argument.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        media: Tensor,  # [B, M, n, Dv]
        *,
        num_media: Tensor | None = None,  # [B]
    ) -> None:
        attentions: list[Any] = [getattr(block, "attn", block) for block in blocks]
        faults = []
        wrong = [type(a).__name__ for a in attentions if not isinstance(a, MaskedCrossAttention)]
        if wrong or not attentions:
            faults.append(
                f"blocks must be GatedCrossAttentionBlock or MaskedCrossAttention modules, got {wrong}"
            )
        elif len({a.attend for a in attentions}) > 1:
            faults.append("blocks must have the same only_attend_immediate_media")
        if media.dim() != 4:
            faults.append(f"media must be [B, M, n, Dv], got {tuple(media.shape)}")
        elif num_media is not None and num_media.shape != media.shape[:1]:
            faults.append(f"num_media must be [B] = ({media.shape[0]},), got {tuple(num_media.shape)}")
        if faults:
            raise ValueError("MediaCache: " + "; ".join(faults))
        self._attentions = attentions
        self._kept = KVCache()
        for layer, attention in enumerate(attentions):
            key, value = attention.keys_values(media)
            self._kept.update(key, value, layer)
        self._intervals: Intervals | None = None
        self.num_slots, self.tokens_per_media = media.shape[1:3]
        self.num_media: int | Tensor = self.num_slots if num_media is None else num_media.to(torch.int32)
        self.seen = torch.zeros(media.shape[0], dtype=torch.int32, device=media.device)

    def step(
        self,
        media_locations: Tensor | None = None,  # [B, t] bool
        *,
        length: int = 1,
    ) -> Intervals:  # two [B, t]
        """Determines what the next t rows of text attend to; call it once per forward, before the blocks.

        Args:
            media_locations: bool ``[B, t]``, True at image tokens; None: `length` rows without any.
            length: t without `media_locations`.

        Returns:
            The intervals, which the blocks read from the cache.
        """
        if media_locations is None:
            time = self.seen[:, None].expand(-1, length)
        elif media_locations.dim() != 2 or media_locations.shape[0] != self.seen.shape[0]:
            rows, shape = self.seen.shape[0], tuple(media_locations.shape)
            raise ValueError(f"MediaCache: media_locations must be [B = {rows}, t], got {shape}")
        else:
            time = self.seen[:, None] + build.text_time(media_locations)
            self.seen = self.seen + media_locations.sum(1, dtype=torch.int32)
        attend = self._attentions[0].attend
        self._intervals = build.media(time, self.tokens_per_media, self.num_media, attend=attend)
        return self._intervals

    def append(
        self,
        media: Tensor,  # [B, m, n, Dv]
        num_media: Tensor | None = None,  # [B]
    ) -> None:
        """Adds m images after those of each sample; `num_media` of them are valid, all when None."""
        new = MediaCache(self._attentions, media, num_media=num_media)
        if new.seen.shape[0] != self.seen.shape[0] or new.tokens_per_media != self.tokens_per_media:
            wanted = f"[B = {self.seen.shape[0]}, m, n = {self.tokens_per_media}, Dv]"
            raise ValueError(f"MediaCache: media must be {wanted}, got {tuple(media.shape)}")
        slots = self.num_slots + new.num_slots
        order = None  # of the slots of both, if samples have different numbers of images
        if isinstance(self.num_media, Tensor):
            place = torch.arange(slots, device=self.seen.device)
            after = place - self.num_media[:, None]
            order = torch.where(after < 0, place, (after + self.num_slots).clamp_max(slots - 1))  # [B, slots]
        for layer, pair in enumerate(new._kept.layers):
            self._kept.update(*pair, layer)
        if order is not None:
            self._kept.map(lambda x: self._take(x, order, slots))
        self.num_media = self.num_media + new.num_media
        self.num_slots = slots
        self._intervals = None

    def drop(self, index: int) -> None:
        """Removes image `index` (0 is the oldest) of every sample, as if it had not been in the text."""
        if not 0 <= index < self.num_slots:
            raise ValueError(f"MediaCache: index must be in [0, {self.num_slots}), got {index}")
        n = self.tokens_per_media
        self._kept.map(lambda x: torch.cat([x[:, :, : index * n], x[:, :, (index + 1) * n :]], 2))
        if isinstance(self.num_media, Tensor):
            self.num_media = self.num_media - (self.num_media > index).int()
        else:
            self.num_media -= 1
        self.num_slots -= 1
        self.seen = self.seen - (self.seen > index).int()
        self._intervals = None

    def reorder(
        self,
        beam_index: Tensor,  # [B']
    ) -> None:
        """Row i of the batch becomes the former row ``beam_index[i]``; B' may differ from B."""
        self._kept.reorder_cache(beam_index)
        if isinstance(self.num_media, Tensor):
            self.num_media = self.num_media.index_select(0, beam_index)
        self.seen = self.seen.index_select(0, beam_index)
        self._intervals = None

    def keys_values(self, attention: MaskedCrossAttention) -> tuple[Tensor, Tensor]:
        """The keys and values for this layer, each [B, Hkv, M n, Dh]."""
        for own, pair in zip(self._attentions, self._kept.layers, strict=True):
            if own is attention:
                return pair
        raise ValueError("MediaCache: the cache was created without this layer")

    def intervals_for(
        self,
        x: Tensor,  # [B, t, D]
    ) -> Intervals:
        """The intervals of the last `step`, which must have been for these rows."""
        if self._intervals is None or self._intervals[0].shape != x.shape[:2]:
            made = None if self._intervals is None else tuple(self._intervals[0].shape)
            raise ValueError(
                f"MediaCache: call step() for the rows [B, t] = {tuple(x.shape[:2])} first; "
                f"the last was for {made}"
            )
        return self._intervals

    def _take(self, x: Tensor, order: Tensor, slots: int) -> Tensor:
        index = order[:, None, :, None, None]
        return x.unflatten(2, (slots, self.tokens_per_media)).take_along_dim(index, 2).flatten(2, 3)
