"""Retrieval, relative representations, contrastive search and detection on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

import vlmkernels
from benchmarks.cases import detection, relative, retrieval
from benchmarks.cases.case import Baseline
from benchmarks.gpu.workload import Workload, cut, peer
from vlmkernels import reference

ANCHORS = 20_000  # of relative_similarity, whose peer stores as many numbers for each row


def of(quick: bool) -> list[Workload]:
    found = []
    for type in ("bf16", "fp32", "tf32"):
        for form, n, m, d, k in (("Q=512", 512, 200_000, 512, 100), ("Q=1", 1, 200_000, 512, 10)):
            sizes = cut(quick, n=n, m=m, d=d)
            plain = peer("torch.topk of a product", partial(partial, retrieval._matmul, k))
            make, ours = retrieval._features, partial(retrieval._values, k)
            found.append(_forward("topk_similarity", form, sizes, type, make, ours, plain))
        sizes = cut(quick, n=25_000, m=25_000, d=512)
        plain = peer("ranks of a product", lambda: retrieval._ranks_of_matrix)
        make, ours = retrieval._features, retrieval._ranks
        found.append(_forward("retrieval_ranks", "N=25000", sizes, type, make, ours, plain))
        sizes, k = cut(quick, n=512, m=200_000, d=512), 16
        plain = peer("torch.topk of a product", partial(partial, retrieval._mined_of_matrix, k))
        ours = partial(retrieval._mined, k)
        found.append(_forward("mine_hard_negatives", "Q=512", sizes, type, make, ours, plain))
        sizes, k = cut(quick, n=512, m=100_000, d=384), 800
        plain = peer("torch.topk of a product, clamped, powered", partial(partial, relative._relative, k))
        make, ours = relative._anchors, partial(_relative, k)
        found.append(_forward("relative_representation", "ASIF, Q=512", sizes, type, make, ours, plain))
    sizes = cut(quick, n=1, m=200_000, d=512)
    plain = peer("torch.topk of a product", partial(partial, retrieval._matmul, 10))
    make, ours = retrieval._quantised, partial(retrieval._values, 10)
    found.append(_forward("topk_similarity", "Q=1, int8 keys", sizes, "fp32", make, ours, plain))
    for type in ("bf16", "fp32"):
        count = 960 if quick else ANCHORS
        sizes = cut(quick, n=512, m=1000) | {"k": 96 if quick else 800, "anchors": count}
        plain = peer("a product of dense rows", partial(partial, relative._dense_product, count))
        make, ours = relative._sparse, relative._similarities
        found.append(_forward("relative_similarity", "ASIF, Q=512", sizes, type, make, ours, plain))
        sizes = {"b": 8, **cut(quick, k=45, t=256, d=768)}
        plain = peer("F.normalize, a product, F.softmax", lambda: relative._magic)
        make, ours = relative._candidates, relative._best
        found.append(_forward("contrastive_search_score", "MAGIC, B=8", sizes, type, make, ours, plain))
        found += [_nms(quick, type), _roi_align(quick, type)]
    return found


def _forward(
    op: str,
    form: str,
    sizes: dict[str, int],
    type: str,
    make: Callable[..., dict[str, Tensor]],
    ours: Callable[..., Tensor],
    peers: tuple[Baseline, ...],
) -> Workload:
    return Workload(op, form, type, sizes, make, ours, peers, backward=False)


def _relative(k: int, **tensors: Tensor) -> Tensor:
    return vlmkernels.relative_representation(**tensors, k=k)[0]


def _nms(quick: bool, type: str) -> Workload:
    others = (
        Baseline("a loop in PyTorch", lambda: partial(reference.nms, iou_threshold=detection.THRESHOLD)),
        Baseline("a matrix of IoU in PyTorch", lambda: detection._by_matrix),
        Baseline("torchvision.ops.nms", detection._by_torchvision),
    )
    return Workload(
        "nms", "N=10000", type, cut(quick, n=10_000), detection._proposals, detection._kept, others,
        backward=False, predicted=False,
    )  # fmt: skip


def _roi_align(quick: bool, type: str) -> Workload:
    pool = partial(detection._each_level, partial(detection._ours, 2))
    others = (
        Baseline("torchvision's Python form", detection._torchvisions_python),
        Baseline("torchvision.ops.roi_align", partial(detection._torchvisions_operator, 2)),
    )
    sizes = cut(quick, count=1000, channels=8 if quick else 256, height=200, width=304)
    return Workload("roi_align", "1000 boxes, 4 levels", type, sizes, detection._pyramid, pool, others)
