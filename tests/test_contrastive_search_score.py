"""The score of contrastive search, against the definition in float64 and the published procedure."""

import pytest
import torch

import vlmkernels
from tests.recorded import RECORDERS, recorded
from vlmkernels import reference
from vlmkernels.testing import assert_as_good

NATIVE = "reference" not in vlmkernels.info()["ops"]["contrastive_search_score"]["CPU"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# samples, candidates, tokens of the context, width
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 7, 12),
    (3, 45, 16, 100),
    (1, 7, 130, 64),
    (4, 6, 0, 9),
    (2, 33, 9, 770),
    (1, 300, 3, 20),
]
raw = torch.ops.vlmkernels.contrastive_search_score


def on_cuda(*tensors, context_lengths=None, **options):
    lengths = None if context_lengths is None else context_lengths.cuda()
    tensors = (None if x is None else x.cuda() for x in tensors)
    return tuple(
        x.cpu() for x in vlmkernels.contrastive_search_score(*tensors, context_lengths=lengths, **options)
    )


OPS = {
    "dispatched": vlmkernels.contrastive_search_score,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}


def sample(b, k, t, d, dtype=torch.float32):
    """prob [b, k], hidden [b, k, d], context [b, t, d], similarity [b, k]."""
    prob = torch.randn(b, k).softmax(1)
    similarity = 3 * torch.randn(b, k)
    return [x.to(dtype) for x in (prob, torch.randn(b, k, d), torch.randn(b, t, d), similarity)]


def published(prob, hidden, context, similarity, alpha, beta):
    """One sample as its authors compute it, [k]."""
    h, c = (x / x.norm(dim=1, keepdim=True) for x in (hidden, context))
    repetition = (h @ c.T).max(dim=1).values
    return (1 - alpha) * prob - alpha * repetition + beta * similarity.softmax(0)


def judge(tensors, op=vlmkernels.contrastive_search_score, **options):
    best, score = op(*tensors, **options)
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    (_, low), (_, exact) = (
        reference.contrastive_search_score(*(x if x is None else x.to(to) for x in tensors), **options)
        for to in (wide, torch.float64)
    )
    assert_as_good(score, low, exact)
    assert torch.equal(best, score.argmax(1))
    return best, score


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_score(op, dtype, shape):
    tensors = sample(*shape, dtype)
    lengths = torch.randint(0, shape[2] + 1, shape[:1])
    for alpha, beta in ((0.1, 2.0), (0.6, 0.15), (0.6, 0.0), (0.0, 2.0), (1.0, -1.0), (0.0, 0.0)):
        judge(tensors, OPS[op], alpha=alpha, beta=beta)
        judge(tensors, OPS[op], alpha=alpha, beta=beta, context_lengths=lengths)
    judge([*tensors[:3], None], OPS[op], alpha=0.5, beta=0.0)


def test_is_the_published_procedure():
    tensors = sample(3, 10, 6, 30)
    for alpha, beta in ((0.1, 2.0), (0.6, 0.15)):
        best, score = vlmkernels.contrastive_search_score(*tensors, alpha=alpha, beta=beta)
        for i in range(3):
            want = published(*(x[i] for x in tensors), alpha, beta)
            torch.testing.assert_close(score[i], want)
            assert best[i] == want.argmax()


def test_alpha_and_beta_0_and_one_candidate_are_greedy():
    prob, *rest = sample(20, 9, 5, 16)
    best, score = vlmkernels.contrastive_search_score(prob, *rest, alpha=0.0, beta=0.0)
    assert torch.equal(best, prob.argmax(1))
    assert torch.equal(score, prob)
    best, _ = vlmkernels.contrastive_search_score(
        *(x[:, :1] for x in (prob, rest[0])), rest[1], rest[2][:, :1], alpha=0.7, beta=2.0
    )
    assert torch.equal(best, torch.zeros(20, dtype=torch.int64))


@pytest.mark.parametrize("k", [2, 16, 33, 100])
def test_equal_scores_are_decided_by_the_lower_index(k):
    prob, hidden, context, similarity = sample(1, 1, 4, 8)
    same = [prob.expand(3, k), hidden.expand(3, k, 8), context.expand(3, 4, 8), similarity.expand(3, k)]
    best, score = vlmkernels.contrastive_search_score(*same, alpha=0.5, beta=1.0)
    assert (score == score[:, :1]).all()
    assert torch.equal(best, torch.zeros(3, dtype=torch.int64))
    for first in range(0, k, 7):
        prob = torch.zeros(1, k)
        prob[0, first:] = 0.5
        best, _ = vlmkernels.contrastive_search_score(prob, *(x[:1] for x in same[1:]), alpha=0.5, beta=0.0)
        assert best == first


@pytest.mark.parametrize("int_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_context_lengths(int_type, dtype):
    """Tokens beyond them are not read, whatever they hold; lengths are clipped."""
    prob, hidden, context, similarity = sample(5, 6, 9, 20, dtype)
    lengths = torch.tensor([0, 4, 9, 12, -3], dtype=int_type)
    clipped = [0, 4, 9, 9, 0]
    for i, length in enumerate(clipped):
        context[i, length:] = torch.nan
    options = {"alpha": 0.4, "beta": 1.0}
    best, score = vlmkernels.contrastive_search_score(
        prob, hidden, context, similarity, context_lengths=lengths, **options
    )
    for i, length in enumerate(clipped):
        one = [x[i : i + 1] for x in (prob, hidden, context[:, :length], similarity)]
        want = vlmkernels.contrastive_search_score(*one, **options)
        torch.testing.assert_close(score[i : i + 1], want[1])
        assert best[i] == want[0]


def test_a_term_whose_factor_is_0_is_not_read():
    prob, hidden, context, similarity = sample(2, 5, 4, 8)
    nan = torch.nan
    _, score = vlmkernels.contrastive_search_score(
        prob, hidden * nan, context * nan, similarity, alpha=0.0, beta=1.0
    )
    torch.testing.assert_close(score, prob + similarity.softmax(1))
    _, score = vlmkernels.contrastive_search_score(
        prob, hidden, context, similarity * nan, alpha=0.2, beta=0.0
    )
    _, want = vlmkernels.contrastive_search_score(prob, hidden, context, None, alpha=0.2, beta=0.0)
    assert torch.equal(score, want)
    assert score.isfinite().all()


@pytest.mark.parametrize("width", [3, 40, 97])
@pytest.mark.parametrize("at", [0, 2])
def test_nan_is_not_hidden_and_is_not_the_best(width, at):
    options = {"alpha": 0.3, "beta": 1.0}
    for damaged in range(4):
        tensors = sample(3, 5, 4, width)
        if damaged == 2:
            tensors[2][1, at, width - 1] = torch.nan
        else:
            tensors[damaged][1, at].fill_(torch.nan)
        best, score = vlmkernels.contrastive_search_score(*tensors, **options)
        assert score[[0, 2]].isfinite().all()
        wanted = [True] * 5 if damaged >= 2 else [i == at for i in range(5)]
        assert score[1].isnan().tolist() == wanted
        if damaged < 2:
            assert best[1] == score[1].nan_to_num(nan=-9).argmax()
        else:
            assert best[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_states_without_a_norm(dtype):
    prob, hidden, context, similarity = sample(3, 5, 4, 20, dtype)
    hidden[0, 1] = 0
    hidden[0, 2] *= 1e-15
    context[1, 2] = 0
    context[2] = 0
    _, score = judge([prob, hidden, context, similarity], alpha=0.5, beta=1.0)
    assert score.isfinite().all()
    torch.testing.assert_close(score[2], 0.5 * prob[2] + similarity[2].softmax(0))


def test_similarities_of_any_size():
    prob, hidden, context, _ = sample(2, 4, 3, 8)
    similarity = torch.tensor([[1e30, 1e30, -1e30, 0], [-1e4, -1e4 + 1, -torch.inf, -2e4]])
    _, score = vlmkernels.contrastive_search_score(prob, hidden, context, similarity, alpha=0.0, beta=1.0)
    torch.testing.assert_close(score - prob, similarity.softmax(1))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 1, 0, 0)], ids=str)
def test_empty(shape):
    tensors = sample(*shape)
    best, score = vlmkernels.contrastive_search_score(*tensors, alpha=0.5, beta=1.0)
    torch.testing.assert_close(score, 0.5 * tensors[0] + tensors[3].softmax(1))
    assert (best.shape, best.dtype) == (shape[:1], torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype):
    tensors = sample(4, 6, 5, 24, dtype)
    options = {
        "alpha": 0.5,
        "beta": 1.0,
        "context_lengths": torch.tensor([3, 5, 1, 0]).repeat_interleave(2)[::2],
    }
    for view in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x[:1].expand_as(x),
    ):
        same = [view(x) for x in tensors]
        got = vlmkernels.contrastive_search_score(*same, **options)
        want = vlmkernels.contrastive_search_score(*(x.contiguous() for x in same), **options)
        if NATIVE:
            assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("model", DTYPES, ids=str)
@pytest.mark.parametrize("scorer", DTYPES, ids=str)
def test_dtypes_of_model_and_scorer_may_differ(model, scorer):
    prob, hidden, context, similarity = sample(2, 5, 4, 12)
    mixed = [prob.to(scorer), hidden.to(model), context.to(model), similarity.to(scorer)]
    _, score = vlmkernels.contrastive_search_score(*mixed, alpha=0.5, beta=1.0)
    assert score.dtype == torch.promote_types(torch.promote_types(model, scorer), torch.float32)
    _, want = reference.contrastive_search_score(*(x.double() for x in mixed), alpha=0.5, beta=1.0)
    torch.testing.assert_close(score.double(), want, rtol=1e-5, atol=1e-5)


def test_results_have_no_gradient():
    tensors = [x.requires_grad_() for x in sample(2, 5, 4, 12)]
    assert not any(
        x.requires_grad for x in vlmkernels.contrastive_search_score(*tensors, alpha=0.5, beta=1.0)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.once
def test_registration(dtype):
    prob, hidden, context, similarity = sample(3, 5, 4, 12, dtype)
    lengths = torch.tensor([0, 2, 4])
    torch.library.opcheck(raw.default, (prob, hidden, context, similarity, lengths, 0.5, 1.0))
    torch.library.opcheck(raw.default, (prob, hidden, context, None, None, 0.5, 0.0))
    permuted = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (prob, hidden, context, similarity)]
    torch.library.opcheck(raw.default, (*permuted, lengths, 0.5, 1.0))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(prob, hidden, context, similarity):
        return vlmkernels.contrastive_search_score(prob, hidden, context, similarity, alpha=0.4, beta=2.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5, 4, 16), (3, 7, 9, 33)):
        tensors = sample(*shape)
        torch.testing.assert_close(compiled(*tensors), step(*tensors))


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.once
def test_recorded(recorder):
    class Score(torch.nn.Module):
        def forward(self, prob, hidden, context, similarity):
            return vlmkernels.contrastive_search_score(prob, hidden, context, similarity, alpha=0.4, beta=2.0)

    b, t = torch.export.Dim("batch", min=2), torch.export.Dim("tokens", min=2)
    module = recorded(recorder, Score(), tuple(sample(3, 5, 4, 12)), [{0: b}, {0: b}, {0: b, 1: t}, {0: b}])
    tensors = sample(7, 5, 9, 12)
    for got, want in zip(module(*tensors), Score()(*tensors), strict=True):
        assert torch.equal(got, want)


def test_autocast_changes_nothing():
    tensors = sample(2, 5, 4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        got = vlmkernels.contrastive_search_score(*tensors, alpha=0.5, beta=1.0)
    assert torch.equal(got[1], vlmkernels.contrastive_search_score(*tensors, alpha=0.5, beta=1.0)[1])


@pytest.mark.skipif(not NATIVE, reason="the reference kernels multiply whole batches")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_do_not_depend_on_each_other(dtype):
    tensors = sample(6, 45, 17, 100, dtype)
    options = {"alpha": 0.4, "beta": 2.0}
    whole = vlmkernels.contrastive_search_score(*tensors, **options)
    for i in range(6):
        one = vlmkernels.contrastive_search_score(*(x[i : i + 1] for x in tensors), **options)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, one, strict=True))


GOOD = dict(zip(("prob", "hidden", "context", "similarity"), sample(2, 3, 4, 5), strict=True))
GOOD |= {"context_lengths": torch.tensor([1, 2]), "alpha": 0.5, "beta": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prob": torch.zeros(2, 0), "hidden": torch.zeros(2, 0, 5), "similarity": torch.zeros(2, 0)},
            "prob must be",
        ),
        (
            {"hidden": torch.zeros(2, 4, 5)},
            r"hidden must be \[B, k, D\] with \[B, k\] = \[2, 3\], got \[2, 4, 5\]",
        ),
        ({"context": torch.zeros(2, 4, 6)}, r"context must be \[B, t, D\] with B = \[2\] and D = \[5\], got"),
        ({"context": torch.zeros(2, 4, 5).double()}, "hidden and context must have the same dtype"),
        ({"similarity": torch.zeros(2, 4)}, r"similarity must be \[B, k\] = \[2, 3\], got \[2, 4\]"),
        ({"similarity": None}, "similarity must be given where beta is not 0, got None and beta 1.0"),
        ({"context_lengths": torch.ones(3).long()}, "context_lengths must be int32 or int64"),
        ({"context_lengths": torch.ones(2)}, "context_lengths must be int32 or int64"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"alpha": float("nan")}, "alpha must be from 0 to 1, got nan"),
        ({"beta": float("inf")}, "beta must be finite, got inf"),
    ],
    ids=str,
)
def test_invalid_arguments(change, message):
    vlmkernels.contrastive_search_score(**GOOD)
    with pytest.raises(ValueError, match=f"^contrastive_search_score: .*{message}"):
        vlmkernels.contrastive_search_score(**GOOD | change)


@pytest.mark.parametrize(
    "name", ["prob", "hidden", "context", "similarity", "context_lengths", "alpha", "beta"]
)
def test_raw_op_refuses(name):
    bad = {"prob": torch.zeros(3), "alpha": -0.1, "beta": float("nan")}
    good = [*GOOD.values()]
    raw(*good)
    values = GOOD | {name: bad.get(name, torch.zeros(7))}
    with pytest.raises(ValueError, match=f"^contrastive_search_score: .*{name}"):
        raw(*values.values())


def test_errors_name_every_invalid_argument():
    changed = GOOD | {"alpha": 2.0, "beta": float("nan"), "similarity": torch.zeros(1, 1)}
    with pytest.raises(ValueError, match=r"alpha .*; beta"):
        vlmkernels.contrastive_search_score(**changed)
    with pytest.raises(TypeError, match="contrastive_search_score: alpha must be float, got str"):
        vlmkernels.contrastive_search_score(**GOOD | {"alpha": "x"})
