"""Losses of rows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import (
    cosine_similarity,
    cross_entropy,
    kl_div,
    l1_loss,
    log_softmax,
    mse_loss,
    normalize,
)

import vlmkernels
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name
from vlmkernels import reference

T = 2.0


def _logits(
    device: str, dtype: torch.dtype, rows: int, classes: int, *, with_target: bool
) -> dict[str, Tensor]:
    student, teacher = (2 * torch.randn(rows, classes, device=device) for _ in range(2))
    tensors = {"student_logits": student.to(dtype).requires_grad_(), "teacher_logits": teacher.to(dtype)}
    if with_target:
        tensors["target"] = torch.randint(classes, (rows,), device=device)
    return tensors


def row_bytes(rows: int, columns: int, itemsize: int) -> float:
    """Student and teacher read in both directions, the gradient written."""
    return 5.0 * rows * columns * itemsize


def _kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_s, log_p = log_softmax(student_logits / T, 1), log_softmax(teacher_logits / T, 1)
    return T * T * kl_div(log_s, log_p, reduction="batchmean", log_target=True)


def _kl_and_targets(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    return 0.5 * _kl(student_logits, teacher_logits) + 0.5 * cross_entropy(student_logits, target)


def distillation(quick: bool, device: str) -> list[Case]:
    """Bound by memory: no product, five tensors moved."""
    forms = {
        "KL(teacher || student)": ({}, Baseline("F.kl_div of F.log_softmax", lambda: _kl)),
        "KL and targets": (
            {"hard_weight": 0.5},
            Baseline("F.kl_div of F.log_softmax, F.cross_entropy", lambda: _kl_and_targets),
        ),
        "KL(student || teacher)": ({"divergence": "reverse_kl"}, None),
        "JSD": ({"divergence": "jsd"}, None),
    }
    cases = []
    for dtype in (F32, BF16):
        for rows, classes in ((64, 1000), (1024, 32_768)):
            for form, (options, peer) in forms.items():
                sizes = cut(quick, rows=rows, classes=classes)
                plain = peer or Baseline(
                    "reference", lambda o=options: partial(reference.distillation, temperature=T, **o)
                )
                compiled = Baseline(f"torch.compile of {plain.name}", plain.make, True)
                large = form == "KL(teacher || student)" and rows == 1024
                cases.append(
                    Case(
                        op="distillation",
                        name=f"N={rows} V={classes} {form} {type_name(dtype)}",
                        dtype=dtype,
                        sizes=sizes,
                        make_inputs=partial(_logits, with_target="hard_weight" in options),
                        ours=partial(vlmkernels.distillation, temperature=T, **options),
                        baselines=timed(quick, plain, compiled),
                        flops=0,
                        min_flops=0,
                        bytes=row_bytes(*sizes.values(), dtype.itemsize),
                        memory=large,
                        headline=large,
                    )
                )
    return cases


def _pairs_of_features(device: str, dtype: torch.dtype, rows: int, width: int) -> dict[str, Tensor]:
    student, teacher = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    return {"student": student.requires_grad_(), "teacher": teacher}


def _l1(student: Tensor, teacher: Tensor) -> Tensor:
    return l1_loss(normalize(student), normalize(teacher), reduction="sum") / len(student)


def _l2(student: Tensor, teacher: Tensor) -> Tensor:
    return mse_loss(normalize(student), normalize(teacher), reduction="sum") / len(student)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - cosine_similarity(student, teacher).mean()


def embedding_distillation(quick: bool, device: str) -> list[Case]:
    """Bound by memory: no product, five tensors moved."""
    forms = {
        "l1": Baseline("F.l1_loss of F.normalize", lambda: _l1),
        "l2": Baseline("F.mse_loss of F.normalize", lambda: _l2),
        "cosine": Baseline("F.cosine_similarity", lambda: _cosine),
    }
    cases = []
    for dtype in (F32, BF16):
        for rows, width in ((64, 512), (16_384, 512), (16_384, 1024)):
            for distance, plain in forms.items():
                sizes = cut(quick, rows=rows, width=width)
                compiled = Baseline(f"torch.compile of {plain.name}", plain.make, True)
                large = distance == "l1" and rows * width == 16_384 * 1024
                cases.append(
                    Case(
                        op="embedding_distillation",
                        name=f"N={rows} D={width} {distance} {type_name(dtype)}",
                        dtype=dtype,
                        sizes=sizes,
                        make_inputs=_pairs_of_features,
                        ours=partial(vlmkernels.embedding_distillation, distance=distance),
                        baselines=timed(quick, plain, compiled),
                        flops=0,
                        min_flops=0,
                        bytes=row_bytes(*sizes.values(), dtype.itemsize),
                        memory=large,
                        headline=large,
                    )
                )
    return cases


CASES = (distillation, embedding_distillation)
