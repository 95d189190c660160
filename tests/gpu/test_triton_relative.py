"""Relative representations and the score of contrastive search on the CPU, under the sanitizer."""

import pytest
import torch

pytest.importorskip("triton")

from vlmkernels.triton import contrastive_search_score, relative_representation, relative_similarity

from .launches import recording
from .trials import DTYPES, check, sanitized
from .trials_relative import Powers, Search, Sparse

pytestmark = pytest.mark.sampled(5)


@pytest.fixture
def blocks(monkeypatch):
    """Rows of several blocks."""
    monkeypatch.setattr(relative_representation, "HELD", 32)
    monkeypatch.setattr(relative_similarity, "ENTRIES", 16)
    for name in ("CANDIDATES", "TOKENS", "FEATURES"):
        monkeypatch.setattr(contrastive_search_score, name, 16)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.3, 1.0, 2.5, 7.0, 8.0, 64.0, 1000.5])
def test_powers(p, dtype):
    check(Powers(5, 45, dtype, p=p))


@pytest.mark.usefixtures("blocks")
def test_small_similarities_do_not_underflow():
    trial = Powers(4, 40, torch.float32)
    trial.similarities[0] *= 1e-30
    trial.similarities[2] *= 1e30
    (values,) = check(trial)
    torch.testing.assert_close(values.norm(dim=1), torch.tensor([1.0, 0, 1, 1]))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("p", [2.5, 8.0])
@pytest.mark.parametrize("at", [0, 31, 44])
def test_nan_of_a_similarity_is_not_hidden(at, p):
    trial = Powers(4, 45, torch.float32, p=p)
    trial.similarities[1, at] = trial.similarities[3, at] = torch.nan
    with sanitized():
        (values,) = trial.launch()
    assert values.isnan().all(1).tolist() == values.isnan().any(1).tolist() == [False, True, False, True]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 9, 31, 32, 33])
def test_every_index_is_found(k):
    """In rows of all lengths around the powers of 2, at whose ends a search is decided."""
    check(Sparse(2, k, 3, 2 * k, 2 * k, torch.float32))
    trial = Sparse(1, k, k, 1, 2 * k, torch.float32)
    trial.tensors[2:] = [torch.ones(k, 1), trial.tensors[1].reshape(k, 1)]
    (found,) = check(trial)
    assert torch.equal(found, trial.tensors[0])


@pytest.mark.usefixtures("blocks")
def test_indices_of_any_size():
    far = [0, 7, 2**31 + 5, 2**62, 2**63 - 1]
    trial = Sparse(2, 5, 3, 5, 9, torch.float32)
    trial.tensors[1] = torch.tensor([far, [1, *far[1:]]])
    trial.tensors[3] = torch.tensor([far, [0, 6, 7, 2**62 - 1, 2**63 - 2], [3, *far[1:]]])
    check(trial)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_hidden(bad):
    trial = Sparse(3, 20, 4, 20, 200, torch.float32)
    trial.tensors[0][1, 18], trial.tensors[2][2, 3] = bad, bad
    with sanitized():
        (out,) = trial.launch()
    finite = torch.ones(3, 4, dtype=torch.bool)
    finite[1], finite[:, 2] = False, False
    assert torch.equal(out.isfinite(), finite)


@pytest.mark.parametrize("side", [1, 3])
def test_indices_that_do_not_ascend_are_refused(side):
    trial = Sparse(2, 5, 3, 5, 9, torch.float32)
    trial.tensors[side] = trial.tensors[side].flip(1)
    with recording() as launches, pytest.raises(ValueError, match="must ascend in each row, from 0 on"):
        trial.launch()
    assert launches == []


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("k", [1, 16, 33])
def test_of_equal_scores_the_first_is_the_best(k):
    trial = Search(2, k, 3, 8, torch.float32)
    trial.tensors[0][:], trial.tensors[3][:] = 0.5, 1.0
    trial.tensors[1][:] = trial.tensors[1][:, :1].clone()
    with sanitized():
        best, _ = trial.launch()
    assert best.tolist() == [0, 0]
    for first in range(0, k, 5):
        trial.tensors[0][:, first:] = 0.5 + (first + 1) / k
        with sanitized():
            best, _ = trial.launch()
        assert best.tolist() == [first, first]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("damaged", range(4))
def test_nan_is_not_hidden_and_is_not_the_best(damaged):
    trial = Search(3, 20, 18, 40, torch.float32)
    for damage in ((1, 17), (1, 3)):
        trial.tensors[damaged][(*damage, 39)[: trial.tensors[damaged].dim()]] = torch.nan
        with sanitized():
            best, score = trial.launch()
        assert score[[0, 2]].isfinite().all()
        wanted = torch.full((20,), damaged >= 2)
        wanted[[17, damage[1]]] = True
        assert torch.equal(score[1].isnan(), wanted)
        assert best[1] == (0 if damaged >= 2 else score[1].nan_to_num(nan=-9).argmax())


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("norm", [0.0, 1e-15, 1e-6, 1e6])
def test_short_and_long_states(norm):
    trial = Search(2, 5, 4, 20, torch.float32)
    trial.tensors[1][0, 1] *= norm
    trial.tensors[2][1, 2] *= norm
    check(trial)


def test_lengths_are_clipped():
    trial = Search(4, 5, 6, 20, torch.float32)
    for int_type in (torch.int32, torch.int64):
        trial.lengths = torch.tensor([-3, 0, 6, 100], dtype=int_type)
        check(trial)


VIEWS = {
    "columns": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_no_bit(dtype, view):
    plain, viewed = Powers(6, 50, dtype), Powers(6, 50, dtype)
    viewed.similarities = view(plain.similarities)
    plain.similarities = viewed.similarities.contiguous()
    pairs = [(viewed, plain)]
    for make in (lambda: Sparse(3, 9, 3, 9, 20, dtype), lambda: Search(3, 5, 5, 20, dtype)):
        plain, viewed = make(), make()
        viewed.tensors = [view(x) for x in plain.tensors]
        plain.tensors = [x.contiguous() for x in viewed.tensors]
        pairs.append((viewed, plain))
    for viewed, plain in pairs:
        with sanitized():
            for got, want in zip(viewed.launch(), plain.launch(), strict=True):
                assert torch.equal(got, want)


def test_float64_and_sizes_of_zero_run_the_reference():
    trials = [
        Powers(3, 5, torch.float64), Powers(0, 5, torch.float32), Powers(3, 0, torch.float32),
        Sparse(2, 3, 4, 5, 9, torch.float32, texts=torch.float64), Sparse(2, 3, 4, 0, 9, torch.float32),
        Sparse(2, 0, 4, 3, 9, torch.float32), Search(2, 3, 4, 5, torch.float32, scorer=torch.float64),
        Search(2, 3, 4, 0, torch.float32), Search(2, 3, 4, 5, torch.float64),
    ]  # fmt: skip
    for trial in trials:
        with recording() as launches:
            got = trial.launch()
        assert launches == []
        for ours, theirs in zip(got, trial.exact(torch.float64), strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_bad_arguments_are_refused_before_a_launch():
    s = torch.zeros(3, 4)
    calls = [
        (relative_representation.relative_representation, (s, 0.0)),
        (relative_representation.relative_representation, (s[0], 8.0)),
        (relative_similarity.relative_similarity, (s, s, s, s)),
        (contrastive_search_score.contrastive_search_score, (s, s, s, s, None, 0.5, 1.0)),
    ]
    for op, values in calls:
        with recording() as launches, pytest.raises(ValueError, match=f"{op.__name__}: "):
            op(*values)
        assert launches == []
