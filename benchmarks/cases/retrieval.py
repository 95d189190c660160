"""Retrieval: forward only, since the results have no gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vlmkernels
from benchmarks import peers
from benchmarks.cases import relative
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name
from vlmkernels.testing import unit_features

K = 100


def _features(device: str, dtype: torch.dtype, n: int, m: int, d: int) -> dict[str, Tensor]:
    query, key = unit_features(n, m, d, dtype=dtype)
    return {"query": query.to(device), "key": key.to(device)}


def _quantised(device: str, dtype: torch.dtype, n: int, m: int, d: int) -> dict[str, Tensor]:
    """int8 keys of the largest number 127 in each row."""
    query, key = unit_features(n, m, d, dtype=dtype)
    scale = key.abs().amax(1) / 127
    rounded = (key / scale[:, None]).round().to(torch.int8)
    return {"query": query.to(device), "key": rounded.to(device), "key_scale": scale.to(device)}


def _values(k: int, **tensors: Tensor) -> Tensor:
    return vlmkernels.topk_similarity(**tensors, k=k)[0]


def _matmul(k: int, query: Tensor, key: Tensor, key_scale: Tensor | None = None) -> Tensor:
    keys = key if key_scale is None else key * key_scale[:, None]
    return (query @ keys.T).topk(min(k, len(key))).values.float()


def _faiss(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The index holds the keys before the clock starts."""
    index_type = peers.load("faiss").IndexFlatIP
    kept: dict[int, Any] = {}

    def search(query: Tensor, key: Tensor) -> Tensor:
        if key.data_ptr() not in kept:
            kept[key.data_ptr()] = index_type(key.shape[1])
            kept[key.data_ptr()].add(key.numpy())
        return torch.from_numpy(kept[key.data_ptr()].search(query.numpy(), min(k, len(key)))[0])

    return search


def topk_similarity(quick: bool, device: str) -> list[Case]:
    """A product where there are many queries; the keys read once where there are few."""
    few, many, most = (200_000, 512, 10), (200_000, 512, 100), (1_000_000, 128, 100)
    cases = []
    for form, dtype, itemsize, numbers in (
        ("fp32", F32, 4, ((1, *few), (8, *few), (512, *many), (64, *most))),
        ("bf16", BF16, 2, ((1, *few), (8, *few), (512, *many))),
        ("int8 keys", F32, 1, ((1, *few), (8, *few), (512, *many))),
    ):
        for n, m, d, k in numbers:
            plain = Baseline("torch.topk of a product", partial(partial, _matmul, k))
            found = [plain, Baseline(f"torch.compile of {plain.name}", plain.make, True)]
            if form == "fp32":
                found.append(Baseline("faiss.IndexFlatIP", partial(_faiss, k)))
            sizes = cut(quick, n=n, m=m, d=d)
            flops = 2.0 * sizes["n"] * sizes["m"] * sizes["d"]
            cases.append(
                Case(
                    op="topk_similarity",
                    name=f"Q={n} M={m} D={d} k={k} {form}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=_quantised if form == "int8 keys" else _features,
                    ours=partial(_values, k),
                    baselines=timed(quick, *found),
                    flops=flops,
                    min_flops=flops,
                    bytes=float(sizes["m"] * sizes["d"] * itemsize + 4 * sizes["n"] * (sizes["d"] + 3 * k)),
                    backward=False,
                    memory=n >= 64,
                    headline=n == 512 and form != "int8 keys",
                )
            )
    return cases


def _ranks(**tensors: Tensor) -> Tensor:
    return torch.cat(vlmkernels.retrieval_ranks(**tensors)).float()


def _ranks_of_matrix(query: Tensor, key: Tensor) -> Tensor:
    """Of pairs (i, i)."""
    scores = query.float() @ key.float().T
    best = scores.diagonal()
    own = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    counts = (~(scores < best[:, None]) & ~own).sum(1), (~(scores < best) & ~own).sum(0)
    return 1 + torch.cat(counts).float()


def retrieval_ranks(quick: bool, device: str) -> list[Case]:
    """Both directions from one matrix; the positives' tiles are formed twice."""
    cases = []
    for dtype in (F32, BF16):
        for n, d in ((5000, 512), (25_000, 512)):
            plain = Baseline("ranks of a product", lambda: _ranks_of_matrix)
            compiled = Baseline(f"torch.compile of {plain.name}", plain.make, True)
            large = n == 25_000  # matrices of 5 GB
            sizes = cut(quick, n=n, m=n, d=d)
            flops = 2.0 * sizes["n"] * sizes["m"] * sizes["d"]
            cases.append(
                Case(
                    op="retrieval_ranks",
                    name=f"N=M={n} D={d} {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=_features,
                    ours=_ranks,
                    baselines=timed(quick, plain, *[compiled] * (not large)),
                    flops=flops,
                    min_flops=flops,
                    bytes=2.0 * sizes["n"] * (sizes["d"] * dtype.itemsize + 8),
                    backward=False,
                    memory=True,
                    headline=not large,
                    long=large,
                )
            )
    return cases


def _mined(k: int, query: Tensor, key: Tensor) -> Tensor:
    """Their similarities, which do not depend on the order of additions as indices may."""
    mined = vlmkernels.mine_hard_negatives(query, key, k)
    return (query.float()[:, None] * key.float()[mined]).sum(2)


def _mined_of_matrix(k: int, query: Tensor, key: Tensor) -> Tensor:
    scores = query @ key.T
    scores.diagonal().fill_(-torch.inf)
    return (query.float()[:, None] * key.float()[scores.topk(k).indices]).sum(2)


def mine_hard_negatives(quick: bool, device: str) -> list[Case]:
    cases = []
    for dtype in (F32, BF16):
        n, m, d, k = 512, 200_000, 512, 16
        plain = Baseline("torch.topk of a product", partial(partial, _mined_of_matrix, k))
        sizes = cut(quick, n=n, m=m, d=d)
        flops = 2.0 * sizes["n"] * sizes["m"] * sizes["d"]
        cases.append(
            Case(
                op="mine_hard_negatives",
                name=f"Q={n} M={m} D={d} k={k} {type_name(dtype)}",
                dtype=dtype,
                sizes=sizes,
                make_inputs=_features,
                ours=partial(_mined, k),
                baselines=timed(quick, plain, Baseline(f"torch.compile of {plain.name}", plain.make, True)),
                flops=flops,
                min_flops=flops,
                bytes=float((sizes["n"] + sizes["m"]) * sizes["d"] * dtype.itemsize),
                backward=False,
                memory=True,
                headline=True,
            )
        )
    return cases


CASES = (mine_hard_negatives, retrieval_ranks, topk_similarity, *relative.CASES)
