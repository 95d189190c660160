"""Keys and values that attention reads again at every step of decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class KVCache:
    """Keys and values of each layer, [B, heads, T, Dh]: those of the tokens read so far.

    New tokens come after those of a layer. With a `capacity`, there is room for so many in every row from the
    start, and each token is written to a slot of its own (`update`).
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.layers: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(
        self,
        key: Tensor,  # [B, heads, t, Dh]
        value: Tensor,  # [B, heads, t, Dh]
        layer_idx: int,
        slots: Tensor | None = None,  # [B, t] int64, where there is a capacity
    ) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of t tokens of a layer; returns all it has, [B, heads, T, Dh] each."""
        if layer_idx == len(self.layers):
            self.layers.append((self._first(key), self._first(value)))
            if slots is None:
                return self.layers[layer_idx]
        if slots is None:
            old_key, old_value = self.layers[layer_idx]
            self.layers[layer_idx] = (torch.cat([old_key, key], 2), torch.cat([old_value, value], 2))
        else:
            rows = torch.arange(len(slots), device=slots.device)[:, None]
            for kept, new in zip(self.layers[layer_idx], (key, value), strict=True):
                kept[rows, :, slots] = new.transpose(1, 2).to(kept.dtype)
        return self.layers[layer_idx]

    def _first(self, x: Tensor) -> Tensor:  # [B, heads, t, Dh]
        if self.capacity is None:
            return x
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
