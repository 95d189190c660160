"""embedding_distillation (contract in ops/embedding_distillation.py).

Rows stay in registers from their norms to their distance, as far as they fit there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.embedding_distillation import EPS, check
from vlmkernels.reference.embedding_distillation import embedding_distillation_bwd as reference_bwd
from vlmkernels.reference.embedding_distillation import embedding_distillation_fwd as reference_fwd
from vlmkernels.triton import _rows as rows
from vlmkernels.triton import _tiles as tiles

TILE = 2048  # features of the rows of a program
HELD = 8192  # features of a row that stay in registers
LEAST: tl.constexpr = tl.constexpr(EPS)  # norm that divides


@triton.jit
def _value(u, v, DISTANCE: tl.constexpr):
    """What is summed over the features; of the cosine, what is added to 1."""
    if DISTANCE == "cosine":
        x = -u * v
    else:
        x = tl.abs(u - v)
        if DISTANCE == "l2":
            x = x * x
        if DISTANCE == "smooth_l1":
            x = tl.where(x < 1.0, 0.5 * x * x, x - 0.5)
    return x


@triton.jit
def _slope(u, v, DISTANCE: tl.constexpr):
    """Its derivative by u."""
    if DISTANCE == "cosine":
        x = -v
    else:
        x = u - v
        if DISTANCE == "l1":
            x = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
        if DISTANCE == "l2":
            x = 2.0 * x
        if DISTANCE == "smooth_l1":
            x = tl.where(x < -1.0, -1.0, tl.where(x > 1.0, 1.0, x))
    return x


@triton.jit
def _tile(STUDENT, TEACHER, WEIGHT, stride_s, stride_t, n, GRAIN: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program's rows: their numbers, weights, whether they are read, and where they begin."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    weight = tl.where(rows < n, 1.0, 0.0)
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + rows, mask=rows < n, other=0.0).to(tl.float32)
    rows = rows.to(tl.int64)
    at_s = STUDENT + rows[:, None] * (stride_s // GRAIN * GRAIN)
    at_t = TEACHER + rows[:, None] * (stride_t // GRAIN * GRAIN)
    return rows, weight, weight != 0.0, at_s, at_t


@triton.jit
def _both(at_s, at_t, cols, read, depth):
    """Some features of the rows; 0 where none are read."""
    inside = read[:, None] & (cols < depth)[None, :]
    x = tl.load(at_s + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    return x, tl.load(at_t + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scales(
    x, y, at_s, at_t, read, depth, NORMALIZE: tl.constexpr, LONG: tl.constexpr, BLOCK_D: tl.constexpr
):
    """What rows of student and teacher are multiplied by, and whether the student's is 1 over its norm."""
    if NORMALIZE:
        of_s, of_t = tl.sum(x * x, 1), tl.sum(y * y, 1)
        if LONG:
            for first in range(BLOCK_D, depth, BLOCK_D):
                x, y = _both(at_s, at_t, first + tl.arange(0, BLOCK_D), read, depth)
                of_s += tl.sum(x * x, 1)
                of_t += tl.sum(y * y, 1)
        of_s, of_t = tl.sqrt(of_s), tl.sqrt(of_t)
        divided = of_s >= LEAST
        of_s, of_t = 1.0 / tl.where(of_s < LEAST, LEAST, of_s), 1.0 / tl.where(of_t < LEAST, LEAST, of_t)
    else:
        of_s = tl.where(read, 1.0, 1.0)
        of_t, divided = of_s, read
    return of_s, of_t, divided


@triton.jit
def _forward(
    STUDENT,  # [n, depth]
    TEACHER,  # [n, depth]
    WEIGHT,  # [n] or None
    LOSS,  # [n] float32
    stride_s,
    stride_t,
    n,
    depth,
    DISTANCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LONG: tl.constexpr,  # a row has several blocks
    GRAIN: tl.constexpr,  # divides depth and strides
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, weight, read, at_s, at_t = _tile(STUDENT, TEACHER, WEIGHT, stride_s, stride_t, n, GRAIN, BLOCK_R)
    depth = depth // GRAIN * GRAIN
    x, y = _both(at_s, at_t, tl.arange(0, BLOCK_D), read, depth)
    of_s, of_t, _ = _scales(x, y, at_s, at_t, read, depth, NORMALIZE, LONG, BLOCK_D)
    total = tl.sum(_value(x * of_s[:, None], y * of_t[:, None], DISTANCE), 1)
    if LONG:
        for first in range(BLOCK_D, depth, BLOCK_D):
            x, y = _both(at_s, at_t, first + tl.arange(0, BLOCK_D), read, depth)
            total += tl.sum(_value(x * of_s[:, None], y * of_t[:, None], DISTANCE), 1)
    if DISTANCE == "cosine":
        total += 1.0
    tl.store(LOSS + rows, tl.where(read, weight * total, 0.0), mask=rows < n)


@triton.jit
def _backward(
    STUDENT,  # [n, depth]
    TEACHER,  # [n, depth]
    WEIGHT,  # [n] or None
    DLOSS,  # [1] or [n]
    SHARE,  # [1] float32: of a weighted row in the mean; or None
    OUT,  # [n, depth]
    stride_s,
    stride_t,
    stride_dloss,
    share,  # as SHARE, where the host knows it
    n,
    depth,
    DISTANCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LONG: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, weight, read, at_s, at_t = _tile(STUDENT, TEACHER, WEIGHT, stride_s, stride_t, n, GRAIN, BLOCK_R)
    depth = depth // GRAIN * GRAIN
    cols = tl.arange(0, BLOCK_D)
    x, y = _both(at_s, at_t, cols, read, depth)
    of_s, of_t, divided = _scales(x, y, at_s, at_t, read, depth, NORMALIZE, LONG, BLOCK_D)
    of_s, of_t = of_s[:, None], of_t[:, None]
    u, v = x * of_s, y * of_t
    coef = tl.load(DLOSS + rows * stride_dloss, mask=rows < n, other=0.0).to(tl.float32) * share
    if SHARE is not None:
        coef *= tl.load(SHARE)
    coef = (coef * weight)[:, None] * of_s
    along = tl.zeros([BLOCK_R], tl.float32)
    if NORMALIZE:
        along += tl.sum(u * _slope(u, v, DISTANCE), 1)
        if LONG:
            for first in range(BLOCK_D, depth, BLOCK_D):
                x, y = _both(at_s, at_t, first + cols, read, depth)
                along += tl.sum(x * of_s * _slope(x * of_s, y * of_t, DISTANCE), 1)
        along = tl.where(divided, along, 0.0)
    along = along[:, None]
    OUT += rows[:, None] * depth
    g = tl.where(read[:, None], coef * (_slope(u, v, DISTANCE) - u * along), 0.0)
    inside = (rows < n)[:, None]
    tl.store(OUT + cols[None, :], g.to(OUT.dtype.element_ty), mask=inside & (cols < depth)[None, :])
    if LONG:
        for first in range(BLOCK_D, depth, BLOCK_D):
            x, y = _both(at_s, at_t, first + cols, read, depth)
            u = x * of_s
            g = tl.where(read[:, None], coef * (_slope(u, y * of_t, DISTANCE) - u * along), 0.0)
            mask = inside & (first + cols < depth)[None, :]
            tl.store(OUT + (first + cols)[None, :], g.to(OUT.dtype.element_ty), mask=mask)


def blocks(depth: int) -> dict:
    """Tile and launch of both kernels for rows of `depth` features."""
    block_d = min(tiles.next_power_of_2(depth), HELD)
    block_r = max(TILE // block_d, 1)
    return {"BLOCK_R": block_r, "BLOCK_D": block_d} | rows.options(block_r * block_d)


def _form(
    student: Tensor, teacher: Tensor, distance: str, normalize: bool
) -> tuple[Tensor, Tensor, tuple, dict]:
    """Student and teacher as the kernels read them, their strides, and what both launches have in common."""
    student, teacher = tiles.rows_contiguous(student), tiles.rows_contiguous(teacher)
    strides, depth = (student.stride(0), teacher.stride(0)), student.shape[1]
    tile = blocks(depth)
    constants = {
        "DISTANCE": distance,
        "NORMALIZE": normalize or distance == "cosine",
        "LONG": depth > tile["BLOCK_D"],
        "GRAIN": rows.grain(depth, *strides),
    }
    return student, teacher, strides, constants | tile


def embedding_distillation(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    weight: Tensor | None,  # [N]
    distance: str,
    normalize: bool,
    reduction: str,
    need_student: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, [] or [N], and dstudent, of size 0 if it is not needed."""
    options = (distance, normalize, reduction)
    if torch.float64 in (student.dtype, teacher.dtype) or student.numel() == 0:
        return reference_fwd(student, teacher, weight, *options, need_student)
    check("embedding_distillation", student, teacher, weight, distance, reduction)
    x, y, strides, form = _form(student, teacher, distance, normalize)
    weight = weight if weight is None else weight.contiguous()
    n, depth = student.shape
    loss = student.new_empty(n, dtype=torch.float32)
    with torch.cuda.device_of(student):
        _forward[(tiles.cdiv(n, form["BLOCK_R"]),)](x, y, weight, loss, *strides, n, depth, **form)
    if reduction != "none":
        loss = rows.total(student, n, loss, weight=weight, mean=reduction == "mean")
    one = loss.new_ones(loss.shape) if need_student else loss
    return loss, embedding_distillation_bwd(one, student, teacher, weight, *options, [need_student])


def embedding_distillation_bwd(
    dloss: Tensor,  # [] or [N]
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    weight: Tensor | None,  # [N]
    distance: str,
    normalize: bool,
    reduction: str,
    needs: Sequence[bool],
) -> Tensor:
    """dstudent, of size 0 if it is not needed."""
    if torch.float64 in (student.dtype, teacher.dtype) or student.numel() == 0:
        inputs = (dloss, student, teacher, weight)
        return reference_bwd(*inputs, distance, normalize, reduction, needs)
    check("embedding_distillation_bwd", student, teacher, weight, distance, reduction, dloss=dloss)
    if not needs[0]:
        return student.new_empty(0)
    student, teacher, strides, form = _form(student, teacher, distance, normalize)
    n, depth = student.shape
    share, factor = None, 1.0
    if weight is not None:
        weight = weight.contiguous()
        share = rows.total(student, n, weight=weight, mean=True) if reduction == "mean" else None
    elif reduction == "mean":
        factor = 1 / n
    out = student.new_empty(student.shape)
    stride = dloss.stride(0) if dloss.dim() else 0
    with torch.cuda.device_of(student):
        _backward[(tiles.cdiv(n, form["BLOCK_R"]),)](
            student, teacher, weight, dloss, share, out, *strides, stride, factor, n, depth, **form
        )
    return out
