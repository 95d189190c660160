"""linear_distillation on a CPU, from one sweep over chunks of rows.

The softmaxes of a row are complete once its logits are there, so loss and gradients come from one look at
them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels._library import define_part, empty_grads
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _sums as sums
from vlmkernels.reference.linear_distillation import check, work_dtype


def flops(layers: Sequence[Any], hard_weight: float, products: int) -> int:
    """Of the student's logits, times `products`, and of the teacher's."""
    hidden, weight, teacher_hidden, teacher_weight = layers
    taught = teacher_hidden is not None and hard_weight < 1
    return pairwise.flops(hidden, weight, products) + (
        pairwise.flops(teacher_hidden, teacher_weight) if taught else 0
    )


# Every row counts; a target is a class. A teacher is given by hidden states and weight, or by k
# log-probabilities and ascending indices of each row, or not at all if hard_weight is 1. With u = row_coef,
# and dz as in vlmkernels/reference/linear_distillation.py:
#   dhidden = dz W        dweight = dz^T h        dbias_j = sum_i dz_ij
# Gradients that are not needed have size 0.
_parts = define_part(
    "linear_distillation_sweep(Tensor student_hidden, Tensor student_weight, Tensor? teacher_hidden,"
    " Tensor? teacher_weight, Tensor? student_bias, Tensor? teacher_bias, Tensor? log_probs, Tensor? indices,"
    " Tensor? target, Tensor row_coef, float temperature, str divergence, float beta, float hard_weight,"
    " bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor row_loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    flops=lambda *inputs, **_: flops(inputs[:4], inputs[13], 1 + sum(inputs[-3:-1])),
)


def forward(*inputs):
    one = inputs[0].new_ones((), dtype=work_dtype(inputs[0], inputs[2]))
    return _sweep("linear_distillation", one, *inputs[:-3], inputs[-3:])


def backward(dloss, *inputs):
    if inputs[-2] == "none":
        check("linear_distillation_bwd", *inputs[:-1], dloss=dloss)
    return _sweep("linear_distillation_bwd", dloss, *inputs)[1:]


def _sweep(
    op, dloss, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
    log_probs, indices, target, temperature, divergence, beta, hard_weight, ignore_index, reduction, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    layers = (student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    options = (temperature, divergence, beta, hard_weight, ignore_index, reduction)
    check(op, *layers, log_probs, indices, target, *options)
    work, n = work_dtype(student_hidden, teacher_hidden), len(student_hidden)
    counted = None
    if target is not None:
        counted = (target != ignore_index).nonzero().squeeze(1)
        counted = None if len(counted) == n else counted
    few = (lambda x: x) if counted is None else (lambda x: x.index_select(0, counted))
    size = 1 if reduction in ("sum", "none") else max(n if counted is None else len(counted), 1)
    u = few((dloss.to(work) / size).expand(n)).contiguous()

    def operand(x: Tensor) -> Tensor:
        return pairwise.with_width(x.to(work) if work == torch.float64 else x)

    h, w = operand(few(student_hidden)), operand(student_weight)
    taught: list[Tensor | None] = [None] * 5
    if hard_weight < 1 and teacher_hidden is not None:
        taught = [operand(few(teacher_hidden)), operand(teacher_weight), teacher_bias, None, None]
    elif hard_weight < 1:
        indices, order = few(indices).sort(1)
        taught[3:] = few(log_probs).to(work).gather(1, order), indices
    if len(student_weight):
        rows, dhidden, dweight, dbias = _parts(
            h, w, *taught[:2], student_bias, *taught[2:], None if target is None else few(target), u,
            *options[:4], *needs,
        )  # fmt: skip
    else:  # no softmaxes
        shape = w.new_empty(0) if student_bias is None else student_bias
        grads = (grad.zero_() for grad in empty_grads((h, w, shape), needs))
        rows, dhidden, dweight, dbias = u.new_zeros(u.shape), *grads
    if needs[0]:
        dhidden = pairwise.without_width(dhidden, student_hidden).to(student_hidden.dtype)
        if counted is not None:
            dhidden = student_hidden.new_zeros(student_hidden.shape).index_copy(0, counted, dhidden)
    else:
        dhidden = student_hidden.new_empty(0)
    if needs[1]:
        dweight = pairwise.without_width(dweight, student_weight).to(student_weight.dtype)
    else:
        dweight = student_weight.new_empty(0)
    if student_bias is None:
        dbias = dbias.to(student_weight.dtype)
    if reduction == "none":
        loss = rows if counted is None else rows.new_zeros(n).index_copy(0, counted, rows)
    else:
        loss = sums.total(rows) / size
    return loss, dhidden, dweight, dbias
