"""Every Triton launcher on the CPU, under the sanitizer, against the contracts of the blocks in float64."""

import pytest
import torch
from torch.nn.functional import softplus

pytest.importorskip("triton")

from vlmkernels import reference
from vlmkernels.ops import _info_nce_sweeps as sweeps
from vlmkernels.ops import _sigmoid_loss_sweep as sigmoid
from vlmkernels.testing import assert_as_good, unit_features
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import gated_residual as gated
from vlmkernels.triton import info_nce, sigmoid_loss

from .interpreter import interpreting
from .trials import DTYPES, check
from .trials_gated import Residual
from .trials_pairwise import Grads, Problem, Sigmoid, Stats

HALF = (torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1), (37, 130, 37), (65, 63, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_info_nce_blocks(size, dtype, normalize):
    p = Problem(*size[:2], size[2] + (normalize and size[2] == 1), dtype, normalize=normalize)
    check(Stats(p))
    check(Grads(p, extra=normalize))


@pytest.mark.parametrize("dtype", HALF)
def test_chunks_of_rows_and_splits_of_columns(dtype, monkeypatch):
    monkeypatch.setattr(pairwise, "CHUNK_ROWS", 70)
    monkeypatch.setattr(info_nce, "PARTIAL_TILES", 1)
    monkeypatch.setattr(info_nce, "PROGRAMS", 6)
    p = Problem(200, 170, 40, dtype)
    check(Stats(p, workspace_bytes=0))
    check(Grads(p, workspace_bytes=0))
    whole, parts = Stats(p), Stats(p, workspace_bytes=0)
    for a, b in zip(parts.finished(check(parts)), whole.finished(check(whole)), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_frozen_sides_cost_and_return_nothing(needs, dtype):
    check(Grads(Problem(37, 45, 24, dtype, normalize=True), needs=needs))


def test_one_direction_has_no_columns():
    p = Problem(37, 70, 24, torch.bfloat16)
    check(Stats(p, columns=False))


@pytest.mark.parametrize("normalize", [False, True])
def test_float64(normalize):
    p = Problem(37, 45, 24, torch.float64, normalize=normalize, scale=80.0, scale_dtype=torch.float64)
    check(Stats(p))
    check(Grads(p, extra=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scale", "offset"), [(100.0, 0.0), (1000.0, 0.0), (50.0, 0.8), (-100.0, 0.0), (1e-3, 0.0)], ids=str
)
def test_extreme_logits(dtype, scale, offset):
    """An offset makes every similarity very low, exponentials far below the range of float32."""
    p = Problem(70, 66, 33, dtype, scale=scale, offset=offset)
    assert offset == 0 or p.logits(torch.float64).max() < -500
    check(Stats(p))
    check(Grads(p))


def test_rows_far_below_the_largest_logit_keep_their_softmax():
    p = Problem(70, 66, 33, torch.float32, scale=100.0)
    p.query[::2] *= 1e-3
    p.query[1::2] *= 5
    check(Stats(p))
    check(Grads(p))


@pytest.mark.parametrize("dtype", HALF)
def test_repeated_positives_and_expanded_features(dtype):
    p = Problem(40, 50, 20, dtype)
    p.positives = torch.full((40,), 7)
    p.query = p.query[:1].expand(40, 20)
    check(Stats(p))
    check(Grads(p))
    p = Problem(40, 50, 20, dtype)
    p.query, p.key = p.query.T.contiguous().T, p.key[:, ::2].repeat_interleave(2, 1)[:, ::2].repeat(1, 2)
    check(Stats(p))


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5)])
def test_empty(n, m):
    query, key, scale = torch.empty(n, 8), torch.randn(m, 8), torch.tensor(2.0)
    with interpreting(sanitize=True):
        row_max, row_sum, _, positive, col_max, col_sum, _, _ = info_nce.info_nce_stats(
            query, key, scale, None, None, torch.empty(n, dtype=torch.int64), True, 0, 0
        )
        grads = info_nce.info_nce_grads(
            query, key, scale, None, None, torch.empty(n, dtype=torch.int64), row_max, row_sum, col_max,
            col_sum, row_max, col_max, row_max, None, None, torch.empty(0), 0, True, True,
        )  # fmt: skip
        rows, dquery, dkey, dscale, dbias = sigmoid_loss.sigmoid_sweep(
            query,
            key,
            scale,
            scale,
            None,
            None,
            torch.empty(n, dtype=torch.int64),
            None,
            None,
            row_max,
            True,
            True,
            True,
            True,
        )
    assert row_sum.shape == positive.shape == rows.shape == dscale.shape == dbias.shape == (n,)
    assert (col_max + col_sum.log() == -float("inf")).all()
    assert grads[0].shape == dquery.shape == (n, 8)
    assert (grads[1] == 0).all()
    assert (dkey == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid_block(size, dtype, normalize):
    n, m, d = size
    scale = 1.0 if n == 1 else 10.0  # the rounding of one large logit is luck
    p = Problem(n, m, d + (normalize and d == 1), dtype, normalize=normalize, scale=scale)
    check(Sigmoid(p, ids=normalize))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sigmoid_block_does_what_is_needed(dtype, monkeypatch):
    monkeypatch.setattr(pairwise, "CHUNK_ROWS", 40)
    monkeypatch.setattr(sigmoid_loss, "CHUNK_BYTES", 0)
    for needed in ((0,), (1,), (2,), (3,), (0, 1, 3), ()):
        p = Problem(70, 45, 20, dtype, normalize=True)
        check(Sigmoid(p, needs=tuple(i in needed for i in range(4))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -40.0), (100.0, 30.0), (0.0, 0.0)])
def test_sigmoid_block_at_extreme_logits(dtype, scale, bias):
    check(Sigmoid(Problem(70, 66, 33, dtype, scale=scale), bias=bias))


def test_softplus_of_a_small_exponential_keeps_its_digits():
    p = Problem(1, 1, 16, torch.float32, scale=0.0)
    p.positives[:] = -1
    with interpreting(sanitize=True):
        for bias in (-1e-3, -3.0, -12.0, -30.0, -80.0):
            rows = sigmoid_loss.sigmoid_sweep(
                p.query, p.key, p.scale, torch.tensor(bias), None, None, p.positives, None, None,
                torch.ones(1), True, False, False, False,
            )[0]  # fmt: skip
            exact = softplus(torch.tensor(bias, dtype=torch.float64), threshold=1e9)
            assert abs(rows.item() / exact.item() - 1) < 5e-7


@pytest.fixture
def triton_sweeps(monkeypatch):
    """The ops composed of the Triton launchers."""
    monkeypatch.setattr(sweeps, "_stats", info_nce.info_nce_stats)
    monkeypatch.setattr(sweeps, "_grads", info_nce.info_nce_grads)
    monkeypatch.setattr(sigmoid, "_parts", sigmoid_loss.sigmoid_sweep)


def truth(op, query, key, scalars, dtype, dloss, **options):
    inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, *scalars)]
    loss = op(*inputs, **options)
    grads = torch.autograd.grad(loss, inputs, dloss.to(loss.dtype))
    if dtype != torch.float64:
        grads = [g.to(x.dtype) for g, x in zip(grads, (query, key, *scalars), strict=True)]
    return [loss.detach(), *grads]


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


@pytest.mark.usefixtures("triton_sweeps")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_info_nce(case, dtype, scale):
    query, key = unit_features(70, 70, 48, dtype=dtype)
    scale = torch.tensor([scale])
    options = {
        "positives": None,
        "weight": None,
        "symmetric": True,
        "label_smoothing": 0.0,
        "normalize": False,
    }
    options |= {"reduction": "mean"} | case
    pair, rest = options["positives"], {k: v for k, v in options.items() if k not in ("positives", "weight")}
    positives, key_ids = pair if isinstance(pair, tuple) else (pair, None)
    dloss = torch.randn(70) if options["reduction"] == "none" else torch.tensor(1.7)
    arguments = (query, key, scale, positives, key_ids, options["weight"])
    tail = tuple(rest.values())
    with interpreting(sanitize=True):
        loss, *saved = sweeps.forward(*arguments, *tail, 0)
        grads = sweeps.backward(dloss, *arguments, *saved, *tail, 0, [True, True, True])
    low = truth(reference.info_nce, query, key, [scale], torch.float32, dloss, **options)
    exact = truth(reference.info_nce, query, key, [scale], torch.float64, dloss, **options)
    for name, got, lower, true in zip(
        ("loss", "dquery", "dkey", "dscale"), [loss, *grads], low, exact, strict=True
    ):
        if name == "loss" or dtype == torch.float32:
            assert_as_good(got, lower, true, name=name)
        else:
            assert (got.double() - true).norm() <= 5e-3 * true.norm()


@pytest.mark.usefixtures("triton_sweeps")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid_loss(dtype, normalize):
    query, key = unit_features(70, 75, 48, dtype=dtype)
    scale, bias, dloss = torch.tensor(10.0), torch.tensor([-10.0]), torch.tensor(1.7)
    with interpreting(sanitize=True):
        loss, *ahead = sigmoid.forward(
            query, key, scale, bias, None, None, normalize, "mean", True, True, True
        )
        grads = sigmoid.backward(dloss, query, key, scale, bias, None, None, normalize, "mean", [True] * 4)
    low, exact = (
        truth(reference.sigmoid_loss, query, key, [scale, bias], work, dloss, normalize=normalize)
        for work in (torch.float32, torch.float64)
    )
    for name, got, lower, true in zip(
        ("loss", "dquery", "dkey", "dscale", "dbias"), [loss, *grads], low, exact, strict=True
    ):
        if got.dim() < 2 or dtype == torch.float32:
            assert_as_good(got, lower, true, name=name)
        else:
            assert (got.double() - true).norm() <= 5e-3 * true.norm()
    for got, later in zip(ahead, grads, strict=True):
        assert (got * dloss - later).norm() <= (1e-5 if got.dtype == torch.float32 else 1e-2) * later.norm()


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
