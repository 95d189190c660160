"""Hard negatives: by brute force over the whole matrix, and the worked example of the documentation."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import vlmkernels
from tests.recorded import RECORDERS, recorded
from vlmkernels import reference
from vlmkernels.reference.mine_hard_negatives import mine_hard_negatives_fwd

from .test_retrieval_ranks import POSITIVES, drawn, integers

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1, 1, 1), (3, 7, 5, 9), (30, 40, 16, 12), (7, 300, 33, 40), (270, 290, 7, 50)]


def on_cuda(query, key, k, *, positives=None, groups=None, **options):
    positives, groups = (
        tuple(y.cuda() for y in x) if isinstance(x, tuple) else None if x is None else x.cuda()
        for x in (positives, groups)
    )
    options |= {"positives": positives, "groups": groups}
    return vlmkernels.mine_hard_negatives(query.cuda(), key.cuda(), k, **options).cpu()


OPS = {
    "dispatched": vlmkernels.mine_hard_negatives,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}


def brute_force(scores, match, k, groups=None, margin=None):
    """Of exact scores [Q, M], one key after the other."""
    found = []
    for i, row in enumerate(scores.tolist()):
        own = [s for s, same in zip(row, match[i].tolist(), strict=True) if same]
        best = float("nan") if any(s != s for s in own) else max(own, default=0)
        some = []
        for j, s in enumerate(row):
            if match[i, j] or (groups is not None and groups[0][i] == groups[1][j]):
                continue
            if margin is not None and own and not s <= best - margin:
                continue
            some.append((s != s, 0.0 if s != s else -s, j))
        found.append([j for *_, j in sorted(some)[:k]])
    return torch.tensor([row + [-1] * (k - len(row)) for row in found]).reshape(-1, k)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", POSITIVES)
@pytest.mark.parametrize("grouped", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("margin", [None, 0.0, 3.0, -2.0])
def test_equal_brute_force(op, dtype, form, grouped, margin):
    for n, m, d, k in SIZES[:4]:
        query, key = integers(n, m, d, dtype=dtype)
        positives, match = drawn(form, n, m)
        groups = (torch.arange(n) % 3, torch.arange(m) % 4) if grouped else None
        got = OPS[op](query, key, k, positives=positives, groups=groups, margin=margin)
        want = brute_force(query.double() @ key.double().T, match, k, groups, margin)
        assert torch.equal(got, want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", POSITIVES)
def test_many_queries(op, form):
    n, m, d, k = SIZES[-1]
    query, key = integers(n, m, d)
    positives, match = drawn(form, n, m)
    got = OPS[op](query, key, k, positives=positives, margin=1.0)
    assert torch.equal(got, brute_force(query.double() @ key.double().T, match, k, margin=1.0))


@pytest.mark.parametrize("n", [3, 60])
def test_normalised(n):
    """By cosine: vectors of length 2, 4 and 6, whose products are exact when divided by it."""
    units = torch.eye(8)[torch.randint(0, 8, (n,))], torch.eye(8)[torch.randint(0, 8, (90,))]
    lengths = 2.0 * torch.randint(1, 4, (90, 1))
    positives, match = drawn("ids", n, 90)
    got = vlmkernels.mine_hard_negatives(
        2 * units[0], lengths * units[1], 9, positives=positives, normalize=True, margin=0.5
    )
    assert torch.equal(got, brute_force(units[0] @ units[1].T, match, 9, margin=0.5))


@pytest.mark.parametrize("margin", [None, 0.0])
@pytest.mark.parametrize("n", [5, 60])
def test_nan(n, margin):
    query, key = integers(n, 80, 6)
    key[20], key[3], query[4], key[50, 0] = torch.nan, torch.nan, torch.nan, torch.inf
    for form in POSITIVES:
        positives, match = drawn(form, n, 80)
        groups = torch.arange(n) % 3, torch.arange(80) % 4
        for each in (None, groups):
            got = vlmkernels.mine_hard_negatives(
                query, key, 80, positives=positives, groups=each, margin=margin
            )
            want = brute_force(query.double() @ key.double().T, match, 80, each, margin)
            assert torch.equal(got, want)


def test_where_there_are_none():
    query, key = torch.ones(4, 2), torch.ones(6, 2)
    ids = torch.zeros(4).long(), torch.zeros(6).long()
    assert (vlmkernels.mine_hard_negatives(query, key, 3, positives=ids) == -1).all()
    alone = torch.full((4,), -100)
    assert (vlmkernels.mine_hard_negatives(query, key, 3, positives=alone, groups=ids) == -1).all()
    got = vlmkernels.mine_hard_negatives(query, key, 8, positives=alone, margin=5.0)
    assert got.tolist() == [[0, 1, 2, 3, 4, 5, -1, -1]] * 4
    assert (vlmkernels.mine_hard_negatives(query, key, 8, margin=0.1) == -1).all()
    got = vlmkernels.mine_hard_negatives(query, key, 2, margin=0.0)
    assert got.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 0, 3), (4, 5, 0)], ids=str)
def test_empty(shape):
    n, m, d = shape
    for margin in (None, 1.0):
        got = vlmkernels.mine_hard_negatives(torch.randn(n, d), torch.randn(m, d), 2, margin=margin)
        want = brute_force(torch.zeros(n, m), torch.eye(n, m).bool(), 2, margin=margin)
        assert torch.equal(got, want.long())
    ids = torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    got = vlmkernels.mine_hard_negatives(torch.randn(3, d), torch.randn(0, d), 2, positives=ids)
    assert got.tolist() == [[-1, -1]] * 3


def test_views():
    query, key = integers(30, 90, 12)
    groups = torch.arange(60)[::2], torch.arange(180)[::2] % 7
    got = vlmkernels.mine_hard_negatives(query[:, ::2], key[:, ::2], 5, groups=groups)
    plain = tuple(x.contiguous() for x in groups)
    want = vlmkernels.mine_hard_negatives(
        query[:, ::2].contiguous(), key[:, ::2].contiguous(), 5, groups=plain
    )
    assert torch.equal(got, want)


def test_the_reference_in_blocks(monkeypatch):
    module = import_module("vlmkernels.reference.mine_hard_negatives")
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "COLS", 11)
    query, key = integers(30, 50, 6)
    key[30] = torch.nan
    groups = torch.arange(30) % 3, torch.arange(50) % 4
    for form in POSITIVES:
        for margin in (None, 1.0):
            for k in (3, 50):
                positives, match = drawn(form, 30, 50)
                options = {"groups": groups, "margin": margin}
                got = reference.mine_hard_negatives(query, key, k, positives=positives, **options)
                want = brute_force(query.double() @ key.double().T, match, k, **options)
                assert torch.equal(got, want)


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.once
def test_registration(permuted):
    query, key = torch.randn(4, 6), torch.randn(9, 6)
    if permuted:
        query, key = (x.T.contiguous().T for x in (query, key))
    op = torch.ops.vlmkernels.mine_hard_negatives.default
    index, ids = torch.arange(4), torch.arange(9)
    for targets in ((None, None, None, None), (index, None, index, ids), (index, ids, None, None)):
        for margin in (None, 0.5):
            torch.library.opcheck(op, (query, key, *targets, 3, margin, True))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(query, key):
        return vlmkernels.mine_hard_negatives(query, key, 5, margin=0.5)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 16, 8), (9, 33, 4)):
        query, key = integers(*shape)
        assert torch.equal(compiled(query, key), step(query, key))


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.once
def test_recorded(recorder):
    class Mine(torch.nn.Module):
        def forward(self, query, key):
            return vlmkernels.mine_hard_negatives(query, key, 5)

    rows, others = torch.export.Dim("rows", min=2), torch.export.Dim("others", min=2)
    mine = recorded(recorder, Mine(), integers(6, 20, 9), [{0: rows}, {0: others}])
    query, key = integers(40, 50, 9)
    assert torch.equal(mine(query, key), Mine()(query, key))


def test_no_change_by_autocast():
    query, key = torch.randn(50, 40, requires_grad=True), torch.randn(60, 40)
    want = vlmkernels.mine_hard_negatives(query, key, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vlmkernels.mine_hard_negatives(query, key, 5), want)


PAGE = Path(__file__).parent.parent / "docs" / "mine_hard_negatives.md"


def test_the_worked_example_of_the_page():
    """Mined keys become keys of info_nce; one that is a positive of another query is no false negative."""
    (example,) = re.findall(r"## A worked example.*?```python\n(.*?)```", PAGE.read_text(), re.S)
    torch.manual_seed(0)
    scope = {}
    exec(compile(example, str(PAGE), "exec"), scope)
    mined, keys, loss = scope["mined"], scope["keys"], scope["loss"]
    ids, key_ids, chosen = scope["ids"], scope["key_ids"], scope["chosen"]
    assert (mined >= 0).all()
    assert len(mined.unique()) == len(mined)
    assert len(keys) == len(chosen) + len(mined)
    assert set(scope["hard"].flatten().tolist()) - {-1} == set(mined.tolist()) | (
        set(scope["hard"].flatten().tolist()) & set(chosen.tolist())
    )
    # the loss of the definition, from all logits
    logits = 20.0 * torch.nn.functional.normalize(scope["query"]) @ torch.nn.functional.normalize(keys).T
    same = ids[:, None] == key_ids
    assert (same.sum(1) > 1).any(), "no mined key is a positive of another query"
    rows = logits.logsumexp(1) - (logits * same).sum(1) / same.sum(1)
    torch.testing.assert_close(loss, rows.mean())
    assert scope["query"].grad.abs().sum() > 0


Q, K = torch.zeros(3, 2), torch.zeros(4, 2)
IDS = torch.zeros(3).long(), torch.zeros(4).long()
BAD = [
    ({"key": torch.zeros(4, 3)}, "query must be [Q, D] and key [M, D], got query (3, 2) and key (4, 3)"),
    ({"query": torch.zeros(5, 2)}, "without positives, M must be at least N, got N = 5 and M = 4"),
    ({"k": 0}, "k must be in [1, 2**31), got 0"),
    ({"positives": torch.zeros(4).long()}, "positives must be int64 of shape (3,)"),
    ({"groups": IDS[::-1]}, "groups[0] must be int64 of shape (3,)"),
    ({"groups": (IDS[0], IDS[0])}, "groups[1] must be int64 of shape (4,)"),
    ({"margin": float("nan")}, "margin must be finite, got nan"),
    ({"margin": float("inf")}, "margin must be finite, got inf"),
    ({"key": K.char()}, "key must be float32"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.once
def test_bad_input(change, message):
    good = {"query": Q, "key": K, "k": 2}
    vlmkernels.mine_hard_negatives(**good, groups=IDS, positives=IDS, margin=0.1)
    with pytest.raises(ValueError, match="mine_hard_negatives: ") as error:
        vlmkernels.mine_hard_negatives(**good | change)
    assert message in str(error.value)


def test_an_index_out_of_range():
    with pytest.raises(IndexError, match=r"mine_hard_negatives: positives must be in \[0, M = 4\) or -100"):
        vlmkernels.mine_hard_negatives(Q, K, 2, positives=torch.tensor([0, 4, 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(4, 3)}, r"query must be \[N, D\] and key \[M, D\]"),
        ({2: torch.zeros(3)}, r"positives must be int64 \[3\]"),
        ({4: IDS[0]}, "groups must be of both"),
        ({4: IDS[0], 5: IDS[0]}, r"key_groups must be int64 \[4\]"),
        ({6: 0}, r"k must be in \[1, 2\*\*31\)"),
    ],
    ids=str,
)
def test_the_raw_reference_refuses(change, message):
    good = [Q, K, None, None, None, None, 2, None, False]
    mine_hard_negatives_fwd(*good)
    with pytest.raises(ValueError, match=f"mine_hard_negatives: {message}"):
        mine_hard_negatives_fwd(*(change.get(i, x) for i, x in enumerate(good)))
