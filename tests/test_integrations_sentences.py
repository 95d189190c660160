"""sentence-transformers' ranking losses as drop-ins: every option is exact on our op, or runs their code."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vlmkernels
from benchmarks import peers
from vlmkernels.integrations import drop_in, patch
from vlmkernels.testing import assert_as_good

reason = peers.why_not("sentence_transformers")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"sentence-transformers: {reason}")

BOTH = ("query_to_doc", "doc_to_query")
ALL = (*BOTH, "query_to_query", "doc_to_doc")


class Table(nn.Sequential):
    """Looks each sentence up: the embeddings are the parameters."""

    def forward(self, features):
        return {"sentence_embedding": self[0](features["input_ids"])[:, 0]}


def losses():
    return peers.load("sentence_transformers.sentence_transformer.losses")


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return Table(nn.Embedding(15, 8, dtype=dtype))


def columns(count=3):
    return [{"input_ids": torch.arange(5 * i, 5 * i + 5)[:, None]} for i in range(count)]


def dot_score(a, b):
    return peers.load("sentence_transformers.util").dot_score(a, b)


def run(loss, count=3):
    value = loss(columns(count), torch.zeros(5))
    value.backward()
    return value.detach(), loss.model[0].weight.grad


@pytest.fixture
def calls(monkeypatch):
    """How often info_nce ran."""
    count = []
    ours = vlmkernels.info_nce
    monkeypatch.setattr(vlmkernels, "info_nce", lambda *a, **k: count.append(1) or ours(*a, **k))
    return count


EXACT = {
    "default": ({}, 1),
    "dot_score": ({"similarity_fct": "dot_score", "scale": 1.0}, 1),
    "symmetric": ({"directions": BOTH, "partition_mode": "per_direction"}, 2),
    "per direction": ({"partition_mode": "per_direction"}, 1),
    "strength zero": ({"hardness_mode": "hard_negatives"}, 1),
}
THEIRS = {
    "joint": {"directions": BOTH},
    "all directions": {"directions": ALL},
    "hardness": {"hardness_mode": "in_batch_negatives", "hardness_strength": 3.0},
    "similarity": {"similarity_fct": dot_score, "scale": 1.0},
}


def options(given):
    given = dict(given)
    if given.get("similarity_fct") == "dot_score":
        given["similarity_fct"] = peers.load("sentence_transformers.util").dot_score
    return given


@pytest.mark.parametrize("count", [2, 3], ids=["pairs", "triplets"])
@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_exact_options(case, cached, count, calls):
    given, expected = EXACT[case]
    cls = losses().CachedMultipleNegativesRankingLoss if cached else losses().MultipleNegativesRankingLoss
    more = {"mini_batch_size": 2} if cached else {}
    ours = run(drop_in(cls)(model(), **options(given), **more), count)
    assert len(calls) == expected
    theirs = run(cls(model(), **options(given), **more), count)
    others = (
        [run(cls(model(), **options(given), mini_batch_size=n), count) for n in (1, 3, 4)] if cached else []
    )
    exact = run(cls(model().double(), **options(given), **more), count)
    for i in range(2):
        assert_as_good(ours[i], [low[i] for low in (theirs, *others)], exact[i])


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_options_that_run_their_code(case, cached, calls):
    cls = losses().CachedMultipleNegativesRankingLoss if cached else losses().MultipleNegativesRankingLoss
    ours, theirs = (kind(model(), **options(THEIRS[case])) for kind in (drop_in(cls), cls))
    for got, wanted in zip(run(ours), run(theirs), strict=True):
        assert torch.equal(got, wanted)
    assert calls == []
    entry = next(entry for entry in patch(theirs) if entry.cls.endswith(cls.__name__))
    assert entry.status == "refused"
    assert entry.why == ours.refusal()


def test_an_option_changed_later_counts(calls):
    cls = losses().CachedMultipleNegativesRankingLoss
    loss = cls(model())
    assert patch(loss).patched
    run(loss)
    assert len(calls) == 1
    loss.similarity_fct = dot_score
    run(loss)
    assert len(calls) == 1


def test_a_drop_in_is_a_subclass():
    cls = losses().MultipleNegativesRankingLoss
    loss = drop_in(cls)(model(), scale=5.0)
    assert isinstance(loss, cls)
    assert loss.get_config_dict() == cls(model(), scale=5.0).get_config_dict()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(other) is drop_in(cls)
        assert torch.equal(run(other)[0], run(loss)[0])


def test_errors_are_theirs():
    with pytest.raises(ValueError, match="at least 2"):
        drop_in(losses().MultipleNegativesRankingLoss)(model())(columns(1), torch.zeros(5))
