"""contrastive_search_score (contract in ops/contrastive_search_score.py).

A program has one sample. Norms and products come from the same reads of hidden states and context.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.contrastive_search_score import contrastive_search_score_fwd, faults_of
from vlmkernels.triton import _tiles as tiles

CANDIDATES = 64  # at most, of a tile of products
TOKENS = 32
FEATURES = 32  # of a step
LEAST: tl.constexpr = tl.constexpr(1e-12)  # norm that divides


@triton.jit
def _repetition(
    H, C, rows, k, tokens, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The largest cosine of some candidates to the tokens, NaN above all; 0 without a token."""
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    zero = tl.zeros([BLOCK_M], tl.float32)
    at = tl.arange(0, BLOCK_K)
    of_rows = H + rows.to(tl.int64)[:, None] * depth + at[None, :]
    for first in range(0, tokens, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        of_cols = C + cols.to(tl.int64)[None, :] * depth + at[:, None]
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        of_h, of_c = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            inside = start + at < depth
            h = tl.load(of_rows + start, mask=(rows < k)[:, None] & inside[None, :], other=0.0)
            c = tl.load(of_cols + start, mask=(cols < tokens)[None, :] & inside[:, None], other=0.0)
            products = tl.dot(h, c, products, input_precision="ieee")
            of_h += tl.sum(h.to(tl.float32) * h.to(tl.float32), 1)
            of_c += tl.sum(c.to(tl.float32) * c.to(tl.float32), 0)
        of_h, of_c = tl.sqrt(of_h), tl.sqrt(of_c)
        of_h, of_c = tl.where(of_h < LEAST, LEAST, of_h), tl.where(of_c < LEAST, LEAST, of_c)
        cosines = products / of_h[:, None] / of_c[None, :]
        zero += tl.sum(cosines * 0.0, 1)
        most = tl.maximum(most, tl.max(tl.where((cols < tokens)[None, :], cosines, -float("inf")), 1))
    return tl.where(tokens > 0, most, 0.0) + zero


@triton.jit
def _forward(
    PROB,  # [b, k]
    H,  # [b, k, depth]
    C,  # [b, t, depth]
    SIMILARITY,  # [b, k] or None
    LENGTHS,  # [b] or None
    SCORE,  # [b, k] float32
    BEST,  # [b] int64
    k,
    t,
    depth,
    alpha,
    beta,
    EACH: tl.constexpr,  # alpha is not 0: each candidate is compared with the context
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    PROB += sample * k
    SCORE += sample * k
    H += sample * k * depth
    C += sample * t * depth
    tokens = t
    if LENGTHS is not None:
        tokens = tl.minimum(tl.maximum(tl.load(LENGTHS + sample), 0), t).to(tl.int32)
    if SIMILARITY is not None:
        SIMILARITY += sample * k
        tops = tl.full([BLOCK_M], -float("inf"), tl.float32)
        for first in range(0, k, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            f = tl.load(SIMILARITY + rows, mask=rows < k, other=-float("inf")).to(tl.float32)
            tops = tl.maximum(tops, f)
        top = tl.max(tops, 0)
        sums = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, k, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            f = tl.load(SIMILARITY + rows, mask=rows < k, other=0.0).to(tl.float32)
            sums += tl.where(rows < k, tl.exp(f - top), 0.0)
        share = beta / tl.sum(sums, 0)
    largest = tl.full((), -float("inf"), tl.float32)
    best = tl.full((), 0, tl.int32)
    for first in range(0, k, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        score = (1.0 - alpha) * tl.load(PROB + rows, mask=rows < k, other=0.0).to(tl.float32)
        if EACH:
            score -= alpha * _repetition(H, C, rows, k, tokens, depth, BLOCK_M, BLOCK_N, BLOCK_K)
        if SIMILARITY is not None:
            f = tl.load(SIMILARITY + rows, mask=rows < k, other=0.0).to(tl.float32)
            score += share * tl.exp(f - top)
        tl.store(SCORE + rows, score, mask=rows < k)
        ranked = tl.where((rows < k) & (score == score), score, -float("inf"))
        here = tl.max(ranked, 0)
        winner = tl.min(tl.where(ranked == here, rows, k), 0)
        best = tl.where(here > largest, winner, best)
        largest = tl.maximum(largest, here)
    tl.store(BEST + sample, best.to(tl.int64))


def blocks(k: int) -> dict:
    """The tile of products for k candidates."""
    block_m = min(max(tiles.next_power_of_2(k), 16), CANDIDATES)
    return {"BLOCK_M": block_m, "BLOCK_N": TOKENS, "BLOCK_K": FEATURES}


def contrastive_search_score(
    prob: Tensor,  # [B, k]
    hidden: Tensor,  # [B, k, D]
    context: Tensor,  # [B, t, D]
    similarity: Tensor | None,  # [B, k]
    context_lengths: Tensor | None,  # [B]
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:  # [B] int64, [B, k]
    inputs = (prob, hidden, context, similarity, context_lengths, alpha, beta)
    floats = [x.dtype for x in (prob, hidden, similarity) if x is not None]
    if faults_of(*inputs) or torch.float64 in floats or hidden.numel() == 0:
        return contrastive_search_score_fwd(*inputs)
    (b, k, depth), t = hidden.shape, context.shape[1]
    score = prob.new_empty((b, k), dtype=torch.float32)
    best = prob.new_empty(b, dtype=torch.int64)
    similarity = tiles.contiguous(similarity) if beta != 0 else None
    with torch.cuda.device_of(prob):
        _forward[(b,)](
            prob.contiguous(), hidden.contiguous(), context.contiguous(), similarity,
            tiles.contiguous(context_lengths), score, best,
            k, t, depth, alpha, beta, EACH=alpha != 0, **blocks(k), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return best, score
