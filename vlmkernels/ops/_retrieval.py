"""Shared by the retrieval ops: keys in memory or in a file, read by blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels.ops import _pairwise_targets as targets
from vlmkernels.reference._retrieval import blocks, key_faults

BLOCK_BYTES = 2**24  # of the rows of a file that are read at a time
OF_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8,
}  # fmt: skip
OF_NUMPY = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "int8": torch.int8,
}  # fmt: skip


@runtime_checkable
class SafetensorsSlice(Protocol):
    """What `safetensors.safe_open(...).get_slice(name)` returns."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: Any) -> Any: ...


class StoredRows:
    """The rows of a numpy array, or of a tensor in a safetensors file."""

    def __init__(self, op: str, name: str, source: numpy.ndarray | SafetensorsSlice) -> None:
        self.source = source
        if isinstance(source, numpy.ndarray):
            self.shape, stored, known = source.shape, source.dtype.name, OF_NUMPY
        else:
            self.shape, stored, known = tuple(source.get_shape()), source.get_dtype(), OF_SAFETENSORS
        if stored not in known:
            raise ValueError(f"{op}: {name} must be stored as {', '.join(known)}, got {stored}")
        self.dtype = known[stored]

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        return len(self.shape)

    def blocks(self, least: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """The rows in order, at least `least` at a time. A block may be overwritten by the next."""
        rows = max(least, BLOCK_BYTES // max(1, self.shape[1] * self.dtype.itemsize))
        memory = torch.empty(min(rows, len(self)), self.shape[1], dtype=self.dtype, device="cpu")
        for part in blocks(len(self), rows):
            yield part, self._read(part, memory).to(device)

    def _read(self, part: slice, memory: Tensor) -> Tensor:
        if isinstance(self.source, numpy.ndarray):  # maps are read-only, which tensors cannot be
            block = memory[: part.stop - part.start]
            numpy.copyto(block.numpy(), self.source[part])
            return block
        rows = self.source[part]
        return rows if isinstance(rows, Tensor) else torch.from_numpy(rows)

    def take(self, indices: Tensor) -> Tensor:  # int64 [...] -> [..., D]
        """Rows by index, each read once, on the device of the indices."""
        wanted, place = indices.unique(return_inverse=True)
        if isinstance(self.source, numpy.ndarray):
            native = self.source.dtype.newbyteorder("=")
            rows = torch.from_numpy(self.source[wanted.cpu().numpy()].astype(native, copy=False))
        else:
            runs = torch.tensor_split(wanted.cpu(), (wanted.diff() > 1).nonzero().flatten().cpu() + 1)
            parts = [slice(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
            memory = torch.empty(0, self.shape[1], dtype=self.dtype, device="cpu")
            rows = torch.cat([memory, *(self._read(part, memory) for part in parts)])
        return rows.to(indices.device)[place]


def as_rows(op: str, name: str, source: Any) -> Any:
    """A tensor as it is, a file as `StoredRows`."""
    return StoredRows(op, name, source) if isinstance(source, (numpy.ndarray, SafetensorsSlice)) else source


def shape_faults(name: str, rows: Any, query: Tensor) -> list[str]:
    if query.dim() == rows.dim() == 2 and query.shape[1] == rows.shape[1]:
        return []
    got = f"query {tuple(query.shape)} and {name} {tuple(rows.shape)}"
    return [f"query must be [Q, D] and {name} [M, D], got {got}"]


def no_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    """The results of these ops are constants."""
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def pair_faults(query: Tensor, key: Tensor, positives: Tensor | None, key_ids: Tensor | None) -> list[str]:
    """Of queries, keys in memory, and which of them match."""
    faults = shape_faults("key", key, query) + key_faults(query, key, None)
    faults += arguments.device_faults({"query": query, "key": key})
    faults += targets.positives_faults(query, key, positives, key_ids)
    if positives is None and query.dim() == key.dim() == 2 and key.shape[0] < query.shape[0]:
        faults.append(
            f"without positives, M must be at least N, got N = {query.shape[0]} and M = {key.shape[0]}"
        )
    return faults
