"""Trials of the retrieval ops. Features are small integers, whose products are exact: many of them tie."""

import torch

from vlmkernels.reference.mine_hard_negatives import mine_hard_negatives_fwd
from vlmkernels.reference.retrieval_ranks import retrieval_ranks_fwd
from vlmkernels.reference.topk_similarity import topk_similarity_fwd
from vlmkernels.triton import mine_hard_negatives, retrieval_ranks, topk_similarity

from .trials import strided, widened


def integers(n, m, d, dtype):
    return tuple(strided(torch.randint(-2, 3, (rows, d)).to(dtype)) for rows in (n, m))


def same(got, want):
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), f"shape or dtype of result {i}"
        nan = torch.equal(ours.isnan(), theirs.isnan())
        assert nan, f"NaN of result {i} elsewhere"
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), f"result {i}"


class TopK:
    """topk_similarity; normalised, rows are multiples of unit vectors by powers of two."""

    def __init__(
        self, n, m, d, dtype, *, k=9, normalize=False, both=False, quantised=False, nan=False, keys=None
    ):
        self.query, self.key = integers(n, m, d, dtype)
        if normalize:
            for x in (self.query, self.key):
                units = torch.eye(d)[torch.randint(0, d, (len(x),))]
                x.copy_(units * 2.0 ** torch.randint(-1, 3, (len(x), 1)))
        self.key_scale = None
        if quantised:
            self.key, self.key_scale = self.key.to(torch.int8), 2.0 ** torch.randint(-2, 3, (m,))
        elif keys is not None:
            self.key = self.key.to(keys)
        if nan:
            self.key[m // 2], self.query[n // 2] = torch.nan, torch.nan
        self.options = (k, normalize, True, both)

    def launch(self):
        return topk_similarity.topk_similarity(self.query, self.key, self.key_scale, *self.options)

    def judge(self, got):
        features = widened((self.query, self.key), torch.float32)
        same(got, topk_similarity_fwd(*features, self.key_scale, *self.options))


def labels(form, n, m):
    """positives and key_ids."""
    if form == "pairs":
        return None, None
    if form == "index":
        return torch.randint(0, m, (n,)).where(torch.rand(n) < 0.8, -100), None
    return torch.randint(0, 9, (n,)), torch.randint(0, 9, (m,))


class Ranks:
    """retrieval_ranks."""

    def __init__(self, n, m, d, dtype, *, form="pairs", nan=False):
        self.query, self.key = integers(n, m, d, dtype)
        if nan:
            self.key[m // 2], self.query[n // 2] = torch.nan, torch.nan
        self.ids = labels(form, n, m)

    def launch(self):
        return retrieval_ranks.retrieval_ranks(self.query, self.key, *self.ids)

    def judge(self, got):
        same(got, retrieval_ranks_fwd(*widened((self.query, self.key), torch.float32), *self.ids))


class Mined:
    """mine_hard_negatives."""

    def __init__(
        self, n, m, d, dtype, *, form="pairs", grouped=False, margin=None, normalize=False, nan=False
    ):
        trial = TopK(n, m, d, dtype, normalize=normalize, nan=nan)
        self.query, self.key = trial.query, trial.key
        groups = labels("ids", n, m) if grouped else (None, None)
        self.options = (*labels(form, n, m), *groups, 9, margin, normalize)

    def launch(self):
        return (mine_hard_negatives.mine_hard_negatives(self.query, self.key, *self.options),)

    def judge(self, got):
        same(got, (mine_hard_negatives_fwd(*widened((self.query, self.key), torch.float32), *self.options),))
