"""Trials of relative_representation, relative_similarity and contrastive_search_score."""

import torch

from vlmkernels.reference.contrastive_search_score import contrastive_search_score_fwd
from vlmkernels.reference.relative_representation import relative_representation_fwd
from vlmkernels.reference.relative_similarity import relative_similarity_fwd
from vlmkernels.triton import contrastive_search_score, relative_representation, relative_similarity

from .trials import judge, strided, widened


class Powers:
    """What follows the search of relative_representation; the second row has no positive similarity."""

    def __init__(self, n, k, dtype, *, p=8.0):
        self.similarities = strided((0.3 * torch.randn(n, k)).to(dtype))
        self.similarities[1:2] = -self.similarities[1:2].abs()
        self.p = p

    def launch(self):
        return (relative_representation.relative_representation(self.similarities, self.p),)

    def exact(self, work):
        return (relative_representation_fwd(self.similarities.to(work), self.p),)

    def judge(self, got):
        judge(("values",), got, self.exact(torch.float32), self.exact(torch.float64))


class Sparse:
    """relative_similarity of n images with k anchors each and m texts with `length`, out of `anchors`."""

    def __init__(self, n, k, m, length, anchors, dtype, *, texts=None):
        def rep(rows, count, dtype):
            chosen = [torch.randperm(anchors)[:count].sort().values for _ in range(rows)]
            return [torch.randn(rows, count).to(dtype), torch.stack(chosen)]

        self.tensors = [*rep(n, k, dtype), *rep(m, length, texts or dtype)]

    def launch(self):
        return (relative_similarity.relative_similarity(*self.tensors),)

    def exact(self, work):
        return (relative_similarity_fwd(*widened(self.tensors, work)),)

    def judge(self, got):
        judge(("similarity",), got, self.exact(torch.float32), self.exact(torch.float64))


class Search:
    """contrastive_search_score; a context holds NaN beyond its length. Without `alike` no cosine is > 0."""

    def __init__(
        self, b, k, t, d, dtype, *, alpha=0.4, beta=2.0, guided=True, lengths=False, scorer=None, alike=True
    ):
        prob, similarity = torch.randn(b, k).softmax(1), 3 * torch.randn(b, k)
        hidden, context = torch.randn(b, k, d).to(dtype), torch.randn(b, t, d).to(dtype)
        if not alike:
            hidden, context = hidden.abs(), -context.abs()
        self.lengths = None
        if lengths:
            self.lengths = torch.arange(b) * t // max(b - 1, 1)
            context[torch.arange(t) >= self.lengths[:, None]] = torch.nan
        self.tensors = [prob.to(scorer or dtype), hidden, context, similarity.to(dtype) if guided else None]
        self.options = (alpha, beta if guided else 0.0)

    def launch(self):
        return contrastive_search_score.contrastive_search_score(*self.tensors, self.lengths, *self.options)

    def exact(self, work):
        return contrastive_search_score_fwd(*widened(self.tensors, work), self.lengths, *self.options)

    def judge(self, got):
        best, score = got
        judge(("score",), [score], [self.exact(torch.float32)[1]], [self.exact(torch.float64)[1]])
        assert torch.equal(best, score.argmax(1)), "best"
