"""Keys and values that attention reads again at every step of decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


class KVCache:
    """Keys and values of each layer, [B, heads, T, Dh]: those of the tokens read so far.

    New tokens come after those of a layer, or each into a slot of its own, of `capacity` in every row.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.beside: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(
        self,
        key: Tensor,  # [B, heads, t, Dh]
        value: Tensor,  # [B, heads, t, Dh]
        layer_idx: int,
        slots: Tensor | None = None,  # [B, t] int64, below the capacity
    ) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of t tokens of a layer; returns all it has, [B, heads, T, Dh] each."""
        is_new = layer_idx == len(self.layers)
        if slots is not None:
            if is_new:
                self.layers.append((self._room_for(key), self._room_for(value)))
            rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
            for kept, new in zip(self.layers[layer_idx], (key, value), strict=True):
                kept[rows, :, slots] = new.transpose(1, 2).to(kept.dtype)
        elif is_new:
            self.layers.append((key, value))
        else:
            old_key, old_value = self.layers[layer_idx]
            self.layers[layer_idx] = (torch.cat([old_key, key], 2), torch.cat([old_value, value], 2))
        return self.layers[layer_idx]

    def _room_for(self, x: Tensor) -> Tensor:  # [B, heads, t, Dh] -> [B, heads, capacity, Dh]
        return x.new_zeros((*x.shape[:2], self.capacity, x.shape[3]))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Every key and value becomes what `change` makes of it."""
        self.layers = [(change(key), change(value)) for key, value in self.layers]

    def reorder_cache(
        self,
        rows: Tensor,  # [B'] int64
    ) -> None:
        """The batch becomes its `rows`, of which there may be more than before."""
        self.map(lambda x: x.index_select(0, rows))

    def choose(
        self,
        index: Tensor,  # [B] int64
    ) -> None:
        """One of the alternatives of each row (`Beside`) joins the tokens read; the others are forgotten."""
        at = index[:, None, None, None]
        for layer_idx, (key, value) in self.beside.items():
            self.update(key.take_along_dim(at, 2), value.take_along_dim(at, 2), layer_idx)
        self.beside = {}


@dataclasses.dataclass(frozen=True)
class Beside:
    """Takes the keys and values of alternatives of the next token of a layer, which do not join its others.

    They are kept until `KVCache.choose`.
    """

    cache: KVCache
    layer_idx: int

    def __call__(
        self,
        key: Tensor,  # [B, heads, k, Dh]
        value: Tensor,  # [B, heads, k, Dh]
    ) -> tuple[Tensor, Tensor]:
        """Those of the tokens read before, [B, heads, T, Dh] each."""
        self.cache.beside[self.layer_idx] = key, value
        return self.cache.layers[self.layer_idx]
