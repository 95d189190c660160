"""Ranks of matches: by hand, by brute force over the whole matrix, and where scores tie or are NaN."""

from importlib import import_module

import pytest
import torch

import vlmkernels
from tests.recorded import RECORDERS, recorded
from vlmkernels import reference
from vlmkernels.reference.retrieval_ranks import retrieval_ranks_fwd

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1, 1), (3, 7, 5), (40, 40, 64), (130, 400, 33), (270, 290, 70)]
POSITIVES = ["diagonal", "index", "ids"]


def on_cuda(query, key, positives=None):
    if isinstance(positives, tuple):
        positives = tuple(x.cuda() for x in positives)
    elif positives is not None:
        positives = positives.cuda()
    return tuple(x.cpu() for x in vlmkernels.retrieval_ranks(query.cuda(), key.cuda(), positives))


OPS = {
    "dispatched": vlmkernels.retrieval_ranks,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}


def integers(n, m, d, *, dtype=torch.float32):
    """Features whose products are exact in every precision: as many ties as there can be."""
    return tuple(torch.randint(-2, 3, (rows, d)).to(dtype) for rows in (n, m))


def drawn(form, n, m):
    """positives, and the pairs that match as a matrix."""
    if form == "diagonal":
        return None, torch.eye(n, m, dtype=torch.bool)
    if form == "index":
        index = torch.randint(0, max(m, 1), (n,)).where(torch.rand(n) < 0.8, -100)
        return index, index[:, None] == torch.arange(m)
    ids = torch.randint(0, n + 3, (n,)), torch.randint(0, n + 3, (m,))
    return ids, ids[0][:, None] == ids[1]


def brute_force(query, key, match):
    scores = query.double() @ key.double().T
    ranks = []
    for s, same in ((scores, match), (scores.T, match.T)):
        for row, own in zip(s.tolist(), same.tolist(), strict=True):
            mine = [x for x, is_own in zip(row, own, strict=True) if is_own]
            others = [x for x, is_own in zip(row, own, strict=True) if not is_own]
            best = float("nan") if any(x != x for x in mine) else max(mine, default=0)
            ranks.append(1 + sum(not x < best for x in others) if mine else len(row) + 1)
    return torch.tensor(ranks[: len(query)]), torch.tensor(ranks[len(query) :])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", POSITIVES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equal_brute_force(op, dtype, form, size):
    n, m, d = size
    query, key = integers(n, m, d, dtype=dtype)
    positives, match = drawn(form, n, m)
    for got, want in zip(OPS[op](query, key, positives), brute_force(query, key, match), strict=True):
        assert got.dtype == torch.int64
        assert torch.equal(got, want)


def test_by_hand():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    key = torch.tensor([[0.5, 0.0], [0.9, 0.4], [0.1, 0.8]])
    assert [x.tolist() for x in vlmkernels.retrieval_ranks(query, key)] == [[2, 2], [1, 2, 3]]
    ranks = vlmkernels.retrieval_ranks(query, key, torch.tensor([1, -100]))
    assert [x.tolist() for x in ranks] == [[1, 4], [3, 1, 3]]
    ranks = vlmkernels.retrieval_ranks(query, key, (torch.tensor([5, 6]), torch.tensor([5, 6, 5])))
    assert [x.tolist() for x in ranks] == [[2, 2], [1, 2, 2]]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_sides_of_two_dtypes(dtypes):
    query, key = integers(30, 50, 20)
    got = vlmkernels.retrieval_ranks(query.to(dtypes[0]), key.to(dtypes[1]))
    assert all(map(torch.equal, got, vlmkernels.retrieval_ranks(query, key)))


@pytest.mark.parametrize("form", POSITIVES)
def test_a_collapsed_model_is_right_about_nothing(form):
    """Equal embeddings, and embeddings that are NaN."""
    for value in (0.0, 1.0, torch.nan):
        features = torch.full((300, 8), value)
        positives, match = drawn(form, 300, 300)
        for ranks, same in zip(
            vlmkernels.retrieval_ranks(features, features, positives), (match, match.T), strict=True
        ):
            others = 300 - same.sum(1)
            assert torch.equal(ranks, torch.where(same.any(1), 1 + others, 301))


@pytest.mark.parametrize("form", POSITIVES)
def test_nan_and_infinity(form):
    query, key = integers(140, 300, 6)
    key[20], key[100, 0], key[130, 0], query[7] = torch.nan, torch.inf, -torch.inf, torch.nan
    positives, match = drawn(form, 140, 300)
    got, want = vlmkernels.retrieval_ranks(query, key, positives), brute_force(query, key, match)
    assert all(map(torch.equal, got, want))


def test_a_match_is_its_own_equal_in_every_tile():
    """Of unit vectors against themselves: a score formed in another order would be above or below."""
    features = torch.nn.functional.normalize(torch.randn(700, 300), dim=1)
    ids = torch.arange(700) // 2
    pairs = features[::2].repeat_interleave(2, 0)
    assert all((ranks == 1).all() for ranks in vlmkernels.retrieval_ranks(pairs, pairs, (ids, ids)))
    assert all((ranks == 2).all() for ranks in vlmkernels.retrieval_ranks(pairs, pairs))


@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 0, 3), (4, 5, 0), (0, 5, 0)], ids=str)
@pytest.mark.parametrize("form", POSITIVES)
def test_empty(shape, form):
    n, m, d = shape
    positives, match = drawn(form, n, m)
    got = vlmkernels.retrieval_ranks(torch.randn(n, d), torch.randn(m, d), positives)
    want = brute_force(torch.zeros(n, d), torch.zeros(m, d), match)
    assert all(map(torch.equal, got, (x.long() for x in want)))
    ids = torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    got = vlmkernels.retrieval_ranks(torch.randn(3, d), torch.randn(0, d), ids)
    assert [x.tolist() for x in got] == [[1, 1, 1], []]


def test_views():
    query, key = integers(80, 200, 40)
    ids = torch.arange(160) % 20, torch.arange(400) % 30
    want = vlmkernels.retrieval_ranks(
        query[:, ::2].contiguous(), key[:, ::2].contiguous(), tuple(x[::2].contiguous() for x in ids)
    )
    got = vlmkernels.retrieval_ranks(query[:, ::2], key[:, ::2], tuple(x[::2] for x in ids))
    assert all(map(torch.equal, got, want))
    got = vlmkernels.retrieval_ranks(query[:1].expand(80, 40), key, ids[0][:1].expand(80))
    want = vlmkernels.retrieval_ranks(query[:1].repeat(80, 1), key, ids[0][:1].repeat(80))
    assert all(map(torch.equal, got, want))


def test_the_reference_in_blocks(monkeypatch):

    module = import_module("vlmkernels.reference.retrieval_ranks")
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "COLS", 11)
    query, key = integers(30, 50, 6)
    for form in POSITIVES:
        positives, match = drawn(form, 30, 50)
        ids = positives if isinstance(positives, tuple) else (positives, None)
        got = retrieval_ranks_fwd(query, key, *ids)
        assert all(map(torch.equal, got, brute_force(query, key, match)))


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.once
def test_registration(permuted):
    query, key = torch.randn(4, 6), torch.randn(9, 6)
    if permuted:
        query, key = (x.T.contiguous().T for x in (query, key))
    op = torch.ops.vlmkernels.retrieval_ranks.default
    index, ids = torch.arange(4), torch.arange(9)
    for targets in ((None, None), (index, None), (index, ids)):
        torch.library.opcheck(op, (query, key, *targets))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(query, key):
        return vlmkernels.retrieval_ranks(query, key)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 16, 8), (9, 33, 4)):
        query, key = integers(*shape)
        assert all(map(torch.equal, compiled(query, key), step(query, key)))


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.once
def test_recorded(recorder):
    class Ranks(torch.nn.Module):
        def forward(self, query, key):
            return vlmkernels.retrieval_ranks(query, key)

    rows, others = torch.export.Dim("rows", min=2), torch.export.Dim("others", min=2)
    ranks = recorded(recorder, Ranks(), integers(6, 20, 9), [{0: rows}, {0: others}])
    query, key = integers(40, 50, 9)
    assert all(map(torch.equal, ranks(query, key), Ranks()(query, key)))


def test_no_change_by_autocast():
    query, key = torch.randn(50, 40, requires_grad=True), torch.randn(60, 40)
    want = vlmkernels.retrieval_ranks(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, vlmkernels.retrieval_ranks(query, key), want))


@pytest.mark.once
def test_memory(peak_memory):
    """The matrix of similarities would have 1.6 GB."""
    script = """
query, key = torch.randn(20_000, 16), torch.randn(20_000, 16)
def run():
    vlmkernels.retrieval_ranks(query, key)
"""
    assert peak_memory(script) < 2**28


Q, K = torch.zeros(3, 2), torch.zeros(4, 2)
BAD = [
    ({"key": torch.zeros(4, 3)}, "query must be [Q, D] and key [M, D], got query (3, 2) and key (4, 3)"),
    ({"query": torch.zeros(5, 2)}, "without positives, M must be at least N, got N = 5 and M = 4"),
    ({"query": Q.long()}, "query must be float32"),
    ({"key": K.char()}, "key must be float32"),
    ({"positives": torch.zeros(4).long()}, "positives must be int64 of shape (3,)"),
    ({"positives": torch.zeros(3)}, "positives must be int64 of shape (3,)"),
    (
        {"positives": (torch.zeros(3).long(), torch.zeros(3).long())},
        "positives[1] must be int64 of shape (4,)",
    ),
    ({"key": torch.zeros(4, 2, device="meta")}, "must be on the same device"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.once
def test_bad_input(change, message):
    good = {"query": Q, "key": K}
    vlmkernels.retrieval_ranks(**good)
    with pytest.raises(ValueError, match="retrieval_ranks: ") as error:
        vlmkernels.retrieval_ranks(**good | change)
    assert message in str(error.value)


@pytest.mark.parametrize("index", [-1, 4, 2**40])
def test_an_index_out_of_range(index):
    for op in (vlmkernels.retrieval_ranks, reference.retrieval_ranks):
        with pytest.raises(IndexError, match=r"retrieval_ranks: positives must be in \[0, M = 4\) or -100"):
            op(Q, K, torch.tensor([0, index, 1]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((None, torch.zeros(4).long()), "key_ids require the ids of the queries"),
        ((torch.zeros(3).int(), None), r"positives must be int64 \[3\]"),
        ((torch.zeros(3).long(), torch.zeros(3).long()), r"key_ids must be int64 \[4\]"),
    ],
)
def test_the_raw_reference_refuses(ids, message):
    with pytest.raises(ValueError, match=f"retrieval_ranks: {message}"):
        retrieval_ranks_fwd(Q, K, *ids)
