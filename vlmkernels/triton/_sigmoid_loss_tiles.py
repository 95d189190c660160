"""The losses of a tile of pairs and their derivatives by the logits, which are in powers of two."""

import math

import triton
import triton.language as tl

from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton._tiles import similarities

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
NOTHING: tl.constexpr = tl.constexpr(-3e38)  # a logit without loss or gradient


@triton.jit
def _log2_1p(e):
    """log2(1 + e) for 0 <= e <= 1 to 2e-7 relative, also where 1 + e rounds."""
    p = -0.0045820817 * e + 0.0281939071
    p = p * e - 0.0813299316
    p = p * e + 0.152112338
    p = p * e - 0.22029473
    p = p * e + 0.283681083
    p = p * e - 0.359975731
    p = p * e + 0.480846081
    p = p * e - 0.721345971
    return (p * e + LOG2E) * e


@triton.jit
def tile_losses(
    Q, K, SCALE, BIAS, A, B, QUERY_IDS, KEY_IDS, rows, cols, row_inside, col_inside, inside, stride_q,
    stride_k, last, m, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each pair: similarity, x, log, whether it is positive. Its loss is softplus(x) = max(x, 0) + log."""
    cosine = similarities(
        Q, K, rows, cols, stride_q, stride_k, last, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    if A is not None:
        cosine *= tl.load(A + rows, mask=row_inside, other=0.0)[:, None]
    if B is not None:
        cosine *= tl.load(B + cols, mask=col_inside, other=0.0)[None, :]
    z = cosine * (LOG2E * tl.load(SCALE).to(tl.float32)) + LOG2E * tl.load(BIAS).to(tl.float32)
    same = pairwise.is_positive(QUERY_IDS, KEY_IDS, rows, cols, row_inside, col_inside)
    x = tl.where(same, -z, z)
    if inside is None:  # found here, it takes a program with more to keep no registers during the product
        inside = row_inside[:, None] & col_inside[None, :]
    x = tl.where(inside, x, NOTHING)
    return cosine, x, _log2_1p(tl.exp2(-tl.abs(x))), same


@triton.jit
def tile_gradient(x, log, same, COEF, rows, row_inside):
    """The derivatives of the losses by the logits, times the coefficients of the rows."""
    grads = tl.exp2(tl.minimum(x, 0.0) - log)  # sigmoid(x)
    if COEF is not None:
        grads *= tl.load(COEF + rows, mask=row_inside, other=0.0)[:, None]
    return tl.where(same, -grads, grads)
