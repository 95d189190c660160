"""Losses of rows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

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


def distillation_bytes(rows: int, classes: int, *, itemsize: int) -> float:
    """Student and teacher read in both directions, the gradient written."""
    return 5.0 * rows * classes * itemsize


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
                        bytes=distillation_bytes(**sizes, itemsize=dtype.itemsize),
                        memory=large,
                        headline=large,
                    )
                )
    return cases


CASES = (distillation,)
