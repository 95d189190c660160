"""The kernels that one call of an op runs on a GPU, and what each moves and multiplies; no GPU is needed.

The public op runs on meta tensors. Its registered CUDA kernels take the place of the shape functions, every
Triton launch is recorded instead of made, and every operator of torch is a step of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.gpu.launches import Launch, intercepting
from tests.gpu.matrix import on
from vlmkernels._library import KERNELS
from vlmkernels.triton import _tiles

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::lift_fresh")
Bounds = tuple[list[int], list[int]]  # start, end of each query


@dataclasses.dataclass
class Step:
    """One kernel, Triton's or torch's."""

    name: str
    operands: list[tuple[int, int, int]]  # storage, offset and bytes of what it reads and of what it writes
    flops: float = 0  # of its products, with those of padded tiles and masked pairs
    kind: str = ""  # of the products: "half", "tf32", "tf32x3", "fp32"
    launch: Launch | None = None
    even: bool = False  # every program multiplies as much as any other
    depth: int = 0  # of the products, where a library does them

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.operands)


@dataclasses.dataclass
class Pass:
    """The forward or the backward."""

    steps: list[Step] = dataclasses.field(default_factory=list)
    read: dict[int, dict[int, int]] = dataclasses.field(default_factory=dict)  # storage -> offset -> bytes
    sizes: dict[int, int] = dataclasses.field(default_factory=dict)  # of storages that are read
    made: dict[int, int] = dataclasses.field(default_factory=dict)
    stays: set[int] = dataclasses.field(default_factory=set)  # what is made and read after the pass
    held: list[Tensor] = dataclasses.field(default_factory=list)  # a freed storage may become another's

    @property
    def flops(self) -> float:
        return sum(step.flops for step in self.steps)

    def add(self, name: str, reads: Iterable[Tensor], writes: Iterable[Tensor], **facts: Any) -> None:
        reads, writes = list(reads), list(writes)
        operands = [(storage(x), x.storage_offset(), touched(x)) for x in reads + writes]
        self.steps.append(Step(name, operands, **facts))
        for x in reads:
            parts = self.read.setdefault(storage(x), {})
            parts[x.storage_offset()] = max(parts.get(x.storage_offset(), 0), touched(x))
            self.sizes[storage(x)] = x.untyped_storage().nbytes()

    @property
    def compulsory(self) -> int:
        """Bytes of what was there before and is read, and of what is made and stays, each once."""
        known = (at for at in self.read if at not in self.made)
        read = sum(min(sum(self.read[at].values()), self.sizes[at]) for at in known)
        return read + sum(size for at, size in self.made.items() if at in self.stays)

    def from_memory(self, cache: int) -> list[int]:
        """Bytes of each step that memory moves where `cache` bytes stay on the chip.

        What fits is read from memory once; what fits and does not outlive the pass is never there.
        """
        seen: set[tuple[int, int]] = set()
        moved = []
        for step in self.steps:
            total = 0
            for at, offset, size in step.operands:
                passing = at in self.made and at not in self.stays
                if max(size, self.made.get(at, 0)) > cache or not (passing or (at, offset) in seen):
                    total += size
                seen.add((at, offset))
            moved.append(total)
        return moved


def run_triton(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """What the op runs for CUDA tensors, in Triton also where the extension has it in CUDA C++."""
    name = op._schema.name.removeprefix("vlmkernels::")
    if not KERNELS.get((name, "CUDA"), "").startswith("CUDA C++"):
        return op.redispatch(CUDA, *args, **kwargs)
    module = importlib.import_module(f"vlmkernels.triton.{name.removesuffix('_bwd')}")
    with torch.no_grad():
        return getattr(module, name)(*args, **kwargs)


class OnTriton(TorchDispatchMode):
    """Ops run the kernels that they have for CUDA, on any tensors, for example in the interpreter."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlmkernels":
            with self:
                return run_triton(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def touched(x: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension is one element."""
    sides = zip(x.shape, x.stride(), strict=True)
    return math.prod(size if stride else min(size, 1) for size, stride in sides) * x.element_size()


def product_kind(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "half"
    return "tf32" if _tiles.tf32_allowed() else "fp32"


class _Recorder(TorchDispatchMode):
    """Every operator becomes a step of `into`; those of the library run their CUDA kernels."""

    def __init__(self, into: Pass):
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "vlmkernels":
            with self:
                return run_triton(func, *args, **kwargs)
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.into.held += inputs + results
        name = func._schema.name
        is_view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if is_view or not results:
            return out
        for x in results:
            if all(x is not y for y in inputs):
                self.into.made[storage(x)] = touched(x)
        if not name.startswith(ALLOCATIONS):
            written = list(tree_leaves(kwargs.get("out", ())))
            read = [x for x in inputs if all(x is not y for y in written)]
            self.into.add(name, read, results, **_products(name, args))
        return out


def _products(name: str, args: Sequence[Any]) -> dict[str, Any]:
    first = {
        "aten::mm": 0,
        "aten::bmm": 0,
        "aten::mv": 0,
        "aten::dot": 0,
        "aten::addmm": 1,
        "aten::addmm_": 1,
        "aten::_addmm_activation": 1,
        "aten::baddbmm": 1,
    }
    if name not in first:
        return {}
    a, b = args[first[name] : first[name] + 2]
    flops = 2.0 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
    return {"flops": flops, "kind": product_kind(a.dtype), "depth": a.shape[-1]}


def _recorded_product(into: Pass, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """In place of `_tiles.product`, which on a GPU is one call of cuBLAS."""
    flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    facts = {"flops": flops, "kind": product_kind(a.dtype), "depth": a.shape[1]}
    into.add("cuBLAS", (a, b, out) if add else (a, b), (out,), **facts)


def _blocks(first: int, last: int, size: int) -> int:
    return -(-max(last - first, 0) // size)


def _clipped(bounds: Bounds | None, tq: int, tk: int) -> Bounds:
    """As the kernels read them."""
    start, end = bounds or ([0] * tq, [tk] * tq)
    return [min(max(x, 0), tk) for x in start], [min(max(x, 0), tk) for x in end]


def _query_pairs(launch: Launch, bounds: Bounds | None) -> tuple[float, bool]:
    """Pairs that one head of one batch multiplies, and whether all programs have the same number."""
    config, arguments = launch.config, launch.arguments
    tq, tk, tk2 = (arguments[name] for name in ("tq", "tk", "tk2"))
    rows, cols = config["BLOCK_M"], config["BLOCK_N"]
    start, end = _clipped(bounds, tq, tk)
    turns = []
    for at in range(0, tq, rows):
        seen = [(a, b) for a, b in zip(start[at : at + rows], end[at : at + rows], strict=True) if b > a]
        lo, hi = min((a for a, _ in seen), default=0), max((b for _, b in seen), default=0)
        turns.append(_blocks(lo, hi, cols) + _blocks(0, tk2, cols))
    return float(sum(turns) * rows * cols), len(set(turns)) == 1


def _key_pairs(launch: Launch, bounds: Bounds | None) -> tuple[float, bool]:
    config, arguments = launch.config, launch.arguments
    tq, tk = arguments["tq"], arguments["tk"]
    rows, cols = config["BLOCK_M"], config["BLOCK_N"]
    start, end = _clipped(bounds, tq, tk)
    turns = []
    for lo in range(0, tk, cols):
        seen = [i for i in range(tq) if start[i] < min(lo + cols, end[i]) and end[i] > lo]
        turns.append(_blocks(seen[0], seen[-1] + 1, rows) if seen else 0)
    return float(sum(turns) * rows * cols), len(set(turns)) == 1


def _small_flops(launch: Launch, tile: float) -> float:
    """Of programs that compute all tiles of their rows, or of their columns, and multiply each once more."""
    config, arguments = launch.config, launch.arguments
    tiles = [_blocks(0, arguments[x], config[side]) for x, side in (("n", "BLOCK_M"), ("m", "BLOCK_N"))]
    sides = sum(arguments[name] is not None for name in ("DQUERY", "DKEY"))
    parts = _blocks(0, arguments["features"], config["BLOCK_D"])
    again = 2.0 * config["BLOCK_M"] * config["BLOCK_N"] * config["BLOCK_D"]
    pairs = sides * parts * (tile + again)
    summed = any(arguments.get(name) is not None for name in ("LOSS", "DSCALE", "DBIAS"))
    if launch.name == "_sigmoid_loss_small._pairs" and summed and arguments["DQUERY"] is None:
        pairs += tile  # of programs that only sum
    return tiles[0] * tiles[1] * pairs


def _grid_pairs(launch: Launch, bounds: Bounds | None) -> tuple[float, bool]:
    """All pairs of the grid, rows of which are padded to blocks; programs of small offsets have most."""
    block, arguments = launch.config["BLOCK"], launch.arguments
    across = _blocks(0, arguments["grid_cols"], block) * block
    return float((arguments["grid_rows"] * across) ** 2), False


def _products_of(launch: Launch, bounds: Bounds | None) -> tuple[float, bool]:
    """FLOPs of a launch's products, and whether all its programs have the same number."""
    config, arguments, name = launch.config, launch.arguments, launch.name
    if "PRECISION" not in config:
        return 0, False
    if "depth" in arguments:
        steps = [("depth", "BLOCK_K"), ("width", "BLOCK_E")]  # of the student and of the teacher
        steps = [(arguments[x], config[block]) for x, block in steps if x in arguments]
        depth = sum(_blocks(0, x, block) * block for x, block in steps)
        tile = 2.0 * config["BLOCK_M"] * config["BLOCK_N"] * depth
        if name in ("info_nce._stats", "contrastive_distillation._stats"):
            rows = _blocks(arguments["start"], arguments["stop"], config["BLOCK_M"])
            return tile * rows * _blocks(0, arguments["m"], config["BLOCK_N"]), True
        if name == "_retrieval._best_matches":  # a query has a match in one tile of keys at least
            return tile * _blocks(0, arguments["n"], config["BLOCK_M"]), False
        if name in ("_info_nce_small._grads", "_sigmoid_loss_small._pairs"):
            return _small_flops(launch, tile), True
        return tile * math.prod(launch.grid), True
    d, v = config["BLOCK_D"], config["BLOCK_V"]
    pairs, across = {
        "_attention._forward": (_query_pairs, d + v),
        "_attention_bwd._query_grads": (_query_pairs, 2 * d + v),
        "_attention_bwd._key_grads": (_key_pairs, 2 * d + 2 * v),
        "interval_attention._bias_grads": (_grid_pairs, d + v),
    }[name]
    if arguments["START"] is None:
        bounds = None
    found, even = pairs(launch, bounds)
    return 2.0 * arguments["Q"].shape[0] * arguments["Q"].shape[1] * found * across, even


def _recorded_launch(into: Pass, launch: Launch, bounds: Bounds | None) -> None:
    """Its tensors are read or written, each once; which of the two, the step need not know."""
    tensors = dict(launch.tensors)
    finish = launch.name in ("_info_nce_bwd._finish", "sigmoid_loss._finish")
    if finish and launch.arguments["A"] is None and not launch.config.get("PAIRS"):
        del tensors["Q"], tensors["K"]  # read only for norms and positives
    flops, even = _products_of(launch, bounds)
    kind = ""
    if flops:
        half = any(x.element_size() == 2 for name, x in launch.tensors.items() if name in ("Q", "H"))
        kind = (
            "half" if half else {"ieee": "fp32"}.get(launch.config["PRECISION"], launch.config["PRECISION"])
        )
    into.add(launch.name, tensors.values(), (), flops=flops, kind=kind, launch=launch, even=even)


@contextlib.contextmanager
def recording(into: Pass, target: str, bounds: Bounds | None = None) -> Iterator[None]:
    """What runs inside on meta tensors, as it would on `target`; `bounds` are the values of the intervals."""

    def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        _recorded_product(into, a, b, out, add=add)

    with (
        on(target),
        mock.patch.object(Tensor, "is_cuda", property(lambda x: x.device.type == "meta")),
        mock.patch.object(torch.cuda, "device_of", return_value=contextlib.nullcontext()),
        mock.patch.object(_tiles, "product", product),
        intercepting(lambda launch: _recorded_launch(into, launch, bounds)),
        _Recorder(into),
    ):
        yield
