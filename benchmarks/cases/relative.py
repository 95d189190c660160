"""Relative representations and the score of contrastive search: forward only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import normalize

import vlmkernels
from benchmarks import peers
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name
from vlmkernels.testing import unit_features


def _anchors(device: str, dtype: torch.dtype, n: int, m: int, d: int) -> dict[str, Tensor]:
    x, anchors = unit_features(n, m, d, dtype=dtype)
    return {"x": x.to(device), "anchors": anchors.to(device)}


def _relative(k: int, x: Tensor, anchors: Tensor) -> Tensor:
    found = (normalize(x.float()) @ normalize(anchors.float()).T).topk(min(k, len(anchors)))
    order = found.indices.argsort(1)
    return normalize(found.values.clamp_min(0).pow(8).gather(1, order))


def relative_representation(quick: bool, device: str) -> list[Case]:
    """A product and the search for the largest; what follows the search is a pass over k numbers."""
    cases = []
    for dtype, itemsize in ((F32, 4), (BF16, 2)):
        for n, m in ((1, 100_000), (512, 100_000)):
            sizes = cut(quick, n=n, m=m, d=384)
            flops = 2.0 * sizes["n"] * sizes["m"] * sizes["d"]
            plain = Baseline(
                "torch.topk of a product, clamped, powered, normalised", partial(partial, _relative, 800)
            )
            compiled = Baseline(f"torch.compile of {plain.name}", plain.make, True)
            cases.append(
                Case(
                    op="relative_representation",
                    name=f"Q={n} n={m} D=384 k=800 {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=_anchors,
                    ours=lambda **tensors: vlmkernels.relative_representation(**tensors)[0],
                    baselines=timed(quick, plain, compiled),
                    flops=flops,
                    min_flops=flops,
                    bytes=float(sizes["m"] * sizes["d"] * itemsize),
                    backward=False,
                    memory=n > 1,
                    headline=n > 1,
                )
            )
    return cases


def _sparse(device: str, dtype: torch.dtype, n: int, m: int, k: int, anchors: int) -> dict[str, Tensor]:
    """Of each row an anchor in each of k parts of all anchors."""
    tensors = {}
    for side, rows in (("image", n), ("text", m)):
        starts = torch.arange(k) * (anchors // k)
        tensors[f"{side}_values"] = torch.rand(rows, k).to(device, dtype)
        tensors[f"{side}_indices"] = (starts + torch.randint(0, anchors // k, (rows, k))).to(device)
    return tensors


def _similarities(image_values, image_indices, text_values, text_indices) -> Tensor:
    return vlmkernels.relative_similarity((image_values, image_indices), (text_values, text_indices))


def _rows_of(values: Tensor, indices: Tensor, anchors: int) -> Tensor:
    return values.new_zeros(len(values), anchors).scatter_(1, indices, values)


def _dense_product(anchors: int, image_values, image_indices, text_values, text_indices) -> Tensor:
    images, texts = ((image_values, image_indices), (text_values, text_indices))
    return (_rows_of(*images, anchors) @ _rows_of(*texts, anchors).T).float()


def _csr(values: Tensor, indices: Tensor, anchors: int) -> Tensor:
    starts = torch.arange(len(values) + 1, device=values.device) * values.shape[1]
    size = (len(values), anchors)
    return torch.sparse_csr_tensor(starts, indices.flatten(), values.float().flatten(), size)


def _sparse_product(anchors: int, image_values, image_indices, text_values, text_indices) -> Tensor:
    return _csr(image_values, image_indices, anchors) @ _rows_of(text_values.float(), text_indices, anchors).T


def _of_scipy(anchors: int) -> Callable[..., Tensor]:
    csr = peers.load("scipy.sparse").csr_matrix

    def rows_of(values: Tensor, indices: Tensor) -> Any:
        starts = numpy.arange(len(values) + 1) * values.shape[1]
        return csr((values.float().numpy().ravel(), indices.numpy().ravel(), starts), (len(values), anchors))

    def product(image_values, image_indices, text_values, text_indices) -> Tensor:
        found = rows_of(image_values, image_indices) @ rows_of(text_values, text_indices).T
        return torch.from_numpy(found.toarray())

    return product


def relative_similarity(quick: bool, device: str) -> list[Case]:
    """Bound by reads that no order of memory foresees; the limit is that of reading both sides once."""
    cases = []
    for dtype, itemsize in ((F32, 4), (BF16, 2)):
        for n, m, anchors in ((1, 10_000, 100_000), (512, 1000, 20_000), (512, 1000, 1_000_000)):
            sizes = cut(quick, n=n, m=m) | {"k": 96 if quick else 800, "anchors": 960 if quick else anchors}
            count = sizes["anchors"]
            plain = Baseline("a product of dense rows", partial(partial, _dense_product, count))
            found = [plain, Baseline(f"torch.compile of {plain.name}", plain.make, True)]
            if anchors > 500_000:  # gigabytes of zeros
                found = []
            elif n > 1:
                found.append(Baseline("torch.sparse_csr_tensor", partial(partial, _sparse_product, count)))
            found.append(Baseline("scipy.sparse.csr_matrix", partial(_of_scipy, count)))
            cases.append(
                Case(
                    op="relative_similarity",
                    name=f"Q={n} C={m} k=800 n={anchors} {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=_sparse,
                    ours=_similarities,
                    baselines=timed(quick, *found),
                    flops=0,
                    min_flops=0,
                    bytes=float((sizes["n"] + sizes["m"]) * sizes["k"] * (itemsize + 8)),
                    backward=False,
                    memory=n > 1,
                    headline=anchors == 20_000,
                )
            )
    return cases


def _candidates(device: str, dtype: torch.dtype, b: int, k: int, t: int, d: int) -> dict[str, Tensor]:
    prob, similarity = torch.randn(b, k).softmax(1), 10 * torch.rand(b, k)
    states = {"hidden": torch.randn(b, k, d), "context": torch.randn(b, t, d)}
    tensors = {"prob": prob, **states, "similarity": similarity}
    return {name: x.to(device, dtype) for name, x in tensors.items()}


def _magic(prob: Tensor, hidden: Tensor, context: Tensor, similarity: Tensor) -> Tensor:
    h, c = normalize(hidden, dim=2), normalize(context, dim=2)
    repetition = (h @ c.mT).amax(2)
    score = 0.9 * prob.float() - 0.1 * repetition.float() + 2.0 * similarity.float().softmax(1)
    return score.gather(1, score.argmax(1, keepdim=True))


def _best(**tensors: Tensor) -> Tensor:
    best, score = vlmkernels.contrastive_search_score(**tensors, alpha=0.1, beta=2.0)
    return score.gather(1, best[:, None])


def contrastive_search_score(quick: bool, device: str) -> list[Case]:
    """A small product for each sample."""
    cases = []
    for dtype, itemsize in ((F32, 4), (BF16, 2)):
        for b, t in ((1, 16), (8, 16), (8, 256)):
            sizes = {"b": b, **cut(quick, k=45, t=t, d=768)}
            flops = 2.0 * b * sizes["k"] * sizes["t"] * sizes["d"]
            plain = Baseline("F.normalize, a product, its maximum and F.softmax", lambda: _magic)
            compiled = Baseline(f"torch.compile of {plain.name}", plain.make, True)
            cases.append(
                Case(
                    op="contrastive_search_score",
                    name=f"B={b} k=45 t={t} D=768 {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=_candidates,
                    ours=_best,
                    baselines=timed(quick, plain, compiled),
                    flops=flops,
                    min_flops=flops,
                    bytes=float(b * (sizes["k"] + sizes["t"]) * sizes["d"] * itemsize),
                    backward=False,
                    memory=t > 16,
                    headline=t > 16,
                )
            )
    return cases


CASES = (relative_representation, relative_similarity, contrastive_search_score)
