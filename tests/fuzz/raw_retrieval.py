"""Valid arguments of the raw ops of retrieval."""

import torch
from torch import Tensor

from .draw import Draw, targets


def keys(draw: Draw, m: int, d: int) -> list:
    """key and key_scale."""
    if draw.flag():
        return [draw.floats(m, d), None]
    return [torch.randint(-127, 128, (m, d), dtype=torch.int8), draw.floats(m)]


def topk_similarity(draw: Draw) -> list:
    n, m, d = draw.size(), draw.size(), draw.size()
    return [draw.floats(n, d), *keys(draw, m, d), draw.choice((1, 2, 5, 40)), *draw.needs(3)]


def two_sides(draw: Draw) -> list:
    """query, key, positives and key_ids."""
    n, d = draw.size(), draw.size()
    m = n + draw.choice((0, 0, 3, 100))
    query, key = draw.floats(n, d), draw.floats(m, d)
    return [query, key, *targets(draw, query, key)]


def retrieval_ranks(draw: Draw) -> list:
    return two_sides(draw)


def mine_hard_negatives(draw: Draw) -> list:
    query, key, *ids = two_sides(draw)
    groups = [draw.ids(len(x), 4) for x in (query, key)] if draw.flag() else [None, None]
    options = [draw.choice((1, 2, 5, 40)), draw.maybe(draw.choice((0.0, 0.5, -1.0))), draw.flag()]
    return [query, key, *ids, *groups, *options]


def relative_representation(draw: Draw) -> list:
    return [draw.floats(draw.size(), draw.size()), draw.choice((1.0, 3.0, 8.0, 2.5, 300.0))]


def sparse_rows(draw: Draw, anchors: int) -> list[Tensor]:
    """Values and indices."""
    rows, k = draw.size(), draw.randrange(anchors + 1)
    indices = torch.rand(rows, anchors).argsort(1)[:, :k].sort(1).values
    return [draw.floats(rows, k), indices]


def relative_similarity(draw: Draw) -> list:
    anchors = draw.size()
    return [*sparse_rows(draw, anchors), *sparse_rows(draw, anchors)]


def contrastive_search_score(draw: Draw) -> list:
    b, k, t, d = draw.small(), draw.size(zero=False), draw.size(), draw.size()
    hidden = draw.floats(b, k, d)
    context = draw.floats(b, t, d, dtype=hidden.dtype)
    similarity = draw.maybe(draw.floats(b, k))
    lengths = draw.maybe(draw.ids(b, t + 3, draw.choice((torch.int32, torch.int64))))
    beta = 0.0 if similarity is None else draw.choice((0.0, 2.0, -1.0))
    return [draw.floats(b, k), hidden, context, similarity, lengths, draw.choice((0.0, 0.4, 1.0)), beta]


OPS = (
    topk_similarity, retrieval_ranks, mine_hard_negatives, relative_representation, relative_similarity,
    contrastive_search_score,
)  # fmt: skip
ARGUMENTS = {make.__name__: make for make in OPS}
