"""Every Triton launcher on the CPU, under the sanitizer, against the contracts of the blocks in float64."""

from unittest import mock

import pytest
import torch
from torch.nn.functional import softplus

pytest.importorskip("triton")

import vlmkernels
from benchmarks.gpu import trace
from vlmkernels import reference
from vlmkernels.ops import _info_nce_sweeps as sweeps
from vlmkernels.ops import _pairwise_small as small
from vlmkernels.ops import _sigmoid_loss_sweep as sigmoid_sweep
from vlmkernels.testing import assert_as_good, unit_features
from vlmkernels.triton import _info_nce_bwd as info_nce_bwd
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_chunked as chunked
from vlmkernels.triton import _pairwise_small as few_rows
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton import gated_residual as gated
from vlmkernels.triton import info_nce, sigmoid_loss

from .interpreter import interpreting
from .launches import recording
from .trials import DTYPES, check, grid
from .trials_gated import Residual
from .trials_pairwise import InfoNCE, Problem, Sigmoid

pytestmark = pytest.mark.sampled(5)

HALF = (torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1), (37, 130, 37), (65, 63, 96)]
ROWS = {"symmetric": False}


@pytest.mark.parametrize(("normalize", "size", "dtype"), grid((False, True), SIZES, DTYPES))
def test_info_nce_of_each_form(size, dtype, normalize):
    n, m, d = size
    scale = 1.0 if n == 1 else 10.0  # the rounding of one large logit is luck
    d += normalize and d == 1
    pairs = Problem(n, n, d, dtype, normalize=normalize, scale=scale)
    check(InfoNCE(pairs, smoothing=0.1 * normalize))
    check(InfoNCE(Problem(n, m, d, dtype, normalize=normalize, scale=scale), form="ids"))
    check(InfoNCE(pairs, form="index", reduction="none", **ROWS))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("pairs", torch.float16),
        ("ids", torch.bfloat16),
        pytest.param("pairs", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("ids", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_chunks_of_rows_and_splits_of_columns(dtype, form, monkeypatch):
    monkeypatch.setattr(few_rows, "LIMIT", 0)
    p = Problem(200, 200, 40, dtype)
    whole = InfoNCE(p, form=form, smoothing=0.1)
    loss = check(whole)[0]
    monkeypatch.setattr(pairwise, "CHUNK_ROWS", 70)
    monkeypatch.setattr(info_nce, "PARTIAL_TILES", 1)
    monkeypatch.setattr(info_nce, "PARTIAL_BYTES", 0)
    monkeypatch.setattr(info_nce, "PROGRAMS", 2)
    whole.options = (*whole.options[:-1], 0)
    assert torch.allclose(check(whole)[0], loss, rtol=1e-6)


@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frozen_inputs_cost_and_return_nothing(needed, dtype, monkeypatch):
    needs = tuple(i in needed for i in range(3))
    trial = InfoNCE(Problem(37, 37, 24, dtype, normalize=True), needs=needs)
    check(trial)
    made = []
    monkeypatch.setattr(tiles, "product", lambda a, b, into, add=False: made.append(add))
    with recording() as launches:
        trial.launch()
    names = [launch.name.rpartition("._")[2] for launch in launches]
    backward = ["norms", *(["tile_grads"] if {0, 1} & set(needed) else []), "finish"] if needed else []
    assert names == ["norms", "stats", "losses", "total", *backward]
    assert made == [False] * sum(i in needed for i in (0, 1))


def test_nothing_that_counts_gives_no_loss_and_no_gradients():
    trial = InfoNCE(Problem(37, 45, 24, torch.float32), form="index", **ROWS)
    trial.problem.positives.fill_(-100)
    with interpreting(sanitize=True):
        assert all((x == 0).all() for x in trial.launch())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scale", "offset"),
    [(100.0, 0.0), (1000.0, 0.0), (50.0, 0.8), (-100.0, 0.0), (1e-3, 0.0), (0.0, 0.0)],
    ids=str,
)
def test_extreme_logits(dtype, scale, offset):
    """An offset makes every similarity very low, exponentials far below the range of float32."""
    p = Problem(70, 70, 33, dtype, scale=scale, offset=offset)
    assert offset == 0 or p.logits(torch.float64).max() < -500
    check(InfoNCE(p))


def test_rows_far_below_the_largest_logit_keep_their_softmax():
    p = Problem(70, 70, 33, torch.float32, scale=100.0)
    p.query[::2] *= 1e-3
    p.query[1::2] *= 5
    check(InfoNCE(p))


@pytest.mark.parametrize("dtype", HALF)
def test_repeated_positives_and_expanded_features(dtype):
    p = Problem(40, 50, 20, dtype)
    p.positives = torch.full((40,), 7)
    p.query = p.query[:1].expand(40, 20)
    check(InfoNCE(p, form="index", **ROWS))
    p = Problem(40, 40, 20, dtype)
    p.query, p.key = p.query.T.contiguous().T, p.key[:, ::2].repeat_interleave(2, 1)[:, ::2].repeat(1, 2)
    check(InfoNCE(p))


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (3, 5)])
def test_empty(n, m):
    """No queries, or features of width 0, whose logits are all 0."""
    query, key, scale = torch.empty(n, 8 * (n == 0)), torch.empty(m, 8 * (n == 0)), torch.tensor(2.0)
    options = (False, 0.0, False, "mean", 0)
    with interpreting(sanitize=True):
        loss, *stats = info_nce.info_nce(query, key, scale, None, None, None, *options)
        inputs = (query, key, scale, None, None, None, *stats)
        grads = info_nce_bwd.info_nce_bwd(torch.ones(()), *inputs, *options, (True,) * 3)
        each = sigmoid_loss.sigmoid_loss(
            query, key, scale, scale, None, None, False, "none", True, True, True
        )
    torch.testing.assert_close(loss, torch.tensor(5.0).log() if n else torch.zeros(()))
    assert [x.shape for x in grads] == [query.shape, key.shape, ()]
    assert all((x == 0).all() for x in grads)
    assert [x.shape for x in each] == [(n,), query.shape, key.shape, (), ()]


def test_raw_sizes_that_do_not_fit_are_refused():
    query, key, scale = torch.ones(3, 8), torch.ones(2, 8), torch.tensor(2.0)
    ids, options = torch.zeros(3, dtype=torch.int64), (True, 0.0, False, "mean", 0)
    for faulty, said in (
        ((query, key, scale, None, None, None), "M must be at least N, got N = 3 and M = 2"),
        ((key, query, scale, None, None, None), "N = 2 and M = 3"),
        ((query, key[:0], scale, ids, ids[:0], None), "N = 3 and M = 0"),
        ((query, key, scale, ids[:2], ids[:2], None), r"positives must be \[3\], got \(2,\)"),
        ((query, key, scale, ids, ids, None), r"key_ids must be \[2\], got \(3,\)"),
        ((query, query, scale, None, None, torch.ones(2)), r"weight must be \[3\], got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            info_nce.info_nce(*faulty, *options)
    with pytest.raises(ValueError, match="sigmoid_loss: without positives M must be at least N"):
        sigmoid_loss.sigmoid_loss(query, key, scale, scale, None, None, False, "mean", True, True, True)


@pytest.mark.parametrize(("normalize", "size", "dtype"), grid((False, True), SIZES, DTYPES))
def test_sigmoid_loss(size, dtype, normalize):
    n, m, d = size
    scale = 1.0 if n == 1 else 10.0  # the rounding of one large logit is luck
    p = Problem(n, m, d + (normalize and d == 1), dtype, normalize=normalize, scale=scale)
    check(Sigmoid(p, form="ids" if normalize else "index"))
    check(Sigmoid(p, form="index", reduction="none" if normalize else "sum"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigmoid_loss_does_what_is_needed(dtype, monkeypatch):
    monkeypatch.setattr(pairwise, "CHUNK_ROWS", 40)
    monkeypatch.setattr(sigmoid_loss, "CHUNK_BYTES", 0)
    for needed in ((0,), (1,), (2,), (3,), (0, 1, 3), ()):
        p = Problem(70, 75, 20, dtype, normalize=True)
        check(Sigmoid(p, form="pairs", needs=tuple(i in needed for i in range(4))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -40.0), (100.0, 30.0), (0.0, 0.0)])
def test_sigmoid_loss_at_extreme_logits(dtype, scale, bias):
    check(Sigmoid(Problem(70, 66, 33, dtype, scale=scale), bias=bias))


def test_softplus_of_a_small_exponential_keeps_its_digits():
    query, nothing = torch.ones(1, 16), torch.tensor([-100])
    with interpreting(sanitize=True):
        for bias in (-1e-3, -3.0, -12.0, -30.0, -80.0):
            inputs = (query, query, torch.tensor(0.0), torch.tensor(bias), nothing, None)
            loss, *_ = sigmoid_loss.sigmoid_loss(*inputs, False, "mean", False, False, False)
            exact = softplus(torch.tensor(bias, dtype=torch.float64), threshold=1e9)
            rounded = torch.finfo(torch.float32).eps / 2 * abs(bias)  # the logit in powers of two
            assert abs(loss.item() / exact.item() - 1) < 5e-7 + rounded


def test_chunks_of_a_card_with_memory_give_every_multiprocessor_a_tile():
    card = 80 << 30
    assert pairwise.chunk_rows(65536, 65536, 2, 1 << 28, card) == 8192
    assert pairwise.chunk_rows(65536, 65536, 2, 1 << 28) == 2048
    assert pairwise.chunk_rows(65536, 65536, 2, 0, card) == pairwise.CHUNK_ROWS
    assert pairwise.chunk_rows(65536, 65536, 2, 1 << 28, card // 8) == 2048
    assert pairwise.chunk_rows(4096, 4096, 2, 1 << 28, card) == 4096
    assert pairwise.chunk_rows(1 << 20, 65536, 2, 1 << 31, card) == 16384


def truth(op, tensors, dloss, **options):
    inputs = [x.detach().requires_grad_() for x in tensors]
    loss = op(*inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, dloss)]


_drawn = torch.Generator().manual_seed(0)  # at import, when no fixture has seeded torch's own


def _numbers(below: int) -> torch.Tensor:  # [70]
    return torch.randint(0, below, (70,), generator=_drawn)


CASES = {
    "clip": {},
    "normalised, smoothed, weighted": {
        "normalize": True,
        "label_smoothing": 0.1,
        "weight": torch.rand(70, generator=_drawn),
    },
    "one direction": {"symmetric": False, "reduction": "sum"},
    "indices": {
        "symmetric": False,
        "positives": _numbers(70).index_fill(0, torch.arange(0, 70, 9), -100),
    },
    "ids": {"positives": (_numbers(20), _numbers(20)), "reduction": "none"},
}


@pytest.fixture
def chunked_sweeps(monkeypatch):
    """In float64 the ops are composed of torch's products of chunks."""
    monkeypatch.setattr(sweeps, "_stats", chunked.info_nce_stats)
    monkeypatch.setattr(sweeps, "_grads", chunked.info_nce_grads)
    monkeypatch.setattr(sigmoid_sweep, "_parts", chunked.sigmoid_sweep)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 30 * 70 * 8)
    monkeypatch.setattr(small, "LIMIT", 0)


@pytest.mark.usefixtures("chunked_sweeps")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_info_nce_in_float64(case):
    tensors = (*unit_features(70, 70, 48, dtype=torch.float64), torch.tensor([30.0], dtype=torch.float64))
    dloss = torch.randn(70 if case.get("reduction") == "none" else ()).double()
    with trace.OnTriton():
        got = truth(vlmkernels.info_nce, tensors, dloss, **case)
    for x, exact in zip(got, truth(reference.info_nce, tensors, dloss, **case), strict=True):
        assert_as_good(x, exact, exact)


@pytest.mark.usefixtures("chunked_sweeps")
@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid_loss_in_float64(normalize):
    scalars = torch.tensor([[30.0], [-10.0]], dtype=torch.float64)
    tensors = (*unit_features(70, 75, 48, dtype=torch.float64), *scalars)
    dloss = torch.randn(()).double()
    with trace.OnTriton():
        got = truth(vlmkernels.sigmoid_loss, tensors, dloss, normalize=normalize)
    for x, exact in zip(got, truth(reference.sigmoid_loss, tensors, dloss, normalize=normalize), strict=True):
        assert_as_good(x, exact, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_public_info_nce(case, dtype):
    tensors = (*unit_features(70, 70, 48, dtype=dtype), torch.tensor([100.0]))
    dloss = torch.randn(70) if case.get("reduction") == "none" else torch.tensor(1.7)
    with interpreting(sanitize=True), trace.OnTriton(), mock.patch.object(small, "LIMIT", 0):
        got = truth(vlmkernels.info_nce, tensors, dloss, **case)
    low = truth(reference.info_nce, [x.float() for x in tensors], dloss, **case)
    exact = truth(reference.info_nce, [x.double() for x in tensors], dloss.double(), **case)
    for i, (x, lower, true) in enumerate(zip(got, low, exact, strict=True)):
        if i == 0 or dtype == torch.float32:
            assert_as_good(x, lower, true)
        else:
            assert (x.double() - true).norm() <= 5e-3 * true.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_public_sigmoid_loss_forms_its_gradients_ahead(dtype):
    scalars = (torch.tensor(10.0), torch.tensor([-10.0]))
    tensors = (*unit_features(70, 75, 48, dtype=dtype), *scalars)
    dloss = torch.tensor(1.7)
    with interpreting(sanitize=True), trace.OnTriton(), mock.patch.object(small, "LIMIT", 0):
        got = truth(vlmkernels.sigmoid_loss, tensors, dloss)
    low = truth(reference.sigmoid_loss, [x.float() for x in tensors], dloss)
    exact = truth(reference.sigmoid_loss, [x.double() for x in tensors], dloss.double())
    for x, lower, true in zip(got, low, exact, strict=True):
        if x.dim() < 2 or dtype == torch.float32:
            assert_as_good(x, lower, true)
        else:
            assert (x.double() - true).norm() <= 5e-3 * true.norm()


GATED = [(3, 1), (7, 37), (5, 96), (33, 130), (2, 2100)]


@pytest.mark.parametrize(
    "dtypes", [*((t, t) for t in (*DTYPES, torch.float64)), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("size", GATED, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gated_residual(size, dtypes, per_channel, masked, monkeypatch):
    monkeypatch.setattr(gated, "PROGRAMS", 2)
    check(Residual(*size, dtypes[0], y_dtype=dtypes[1], per_channel=per_channel, masked=masked))


def test_gated_residual_computes_what_is_needed_and_repeats_its_bits():
    x, gate = torch.randn(3, 41, 50).bfloat16(), torch.randn(50)
    with interpreting(sanitize=True):
        dy, dgate = gated.gated_residual_bwd(x[:1, :1].expand(3, 41, 50), x, gate, None, (True, False))
        assert (dy.shape, dgate.numel()) == (x.shape, 0)
        dy, dgate = gated.gated_residual_bwd(x, x, gate, None, (False, True))
        assert (dy.numel(), dgate.shape) == (0, gate.shape)
        assert torch.equal(dgate, gated.gated_residual_bwd(x, x, gate, None, (True, True))[1])
        empty = gated.gated_residual_bwd(x[:0], x[:0], gate, None, (True, True))
    assert torch.equal(empty[1], torch.zeros(50))


@pytest.mark.parametrize("gate", [0.0, 1e-30, 1e-4, -0.3, 20.0])
def test_gated_residual_at_small_gates_keeps_relative_accuracy(gate):
    x, y, gate = torch.zeros(4, 64), torch.randn(4, 64), torch.tensor(gate)
    with interpreting(sanitize=True):
        out = gated.gated_residual(x, y, gate, None)
    assert torch.allclose(out.double(), gate.double().tanh() * y.double(), rtol=1e-6, atol=0)
