"""Every Triton launcher on the CPU, under the sanitizer, against the contracts of the blocks in float64."""

import pytest
import torch
from torch.nn.functional import softplus

pytest.importorskip("triton")

from vlmkernels import reference
from vlmkernels.ops import _contrastive as contrastive
from vlmkernels.ops import _info_nce_sweeps as sweeps
from vlmkernels.ops import _sigmoid_sweep as sigmoid
from vlmkernels.reference.gated_residual import gated_residual_bwd, gated_residual_fwd
from vlmkernels.testing import assert_as_good, unit_features
from vlmkernels.triton import _contrastive as tiles
from vlmkernels.triton import gated_residual as gated
from vlmkernels.triton import info_nce, sigmoid_loss

from .interpreter import interpreting

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
SIZES = [(1, 1, 1), (37, 130, 37), (65, 63, 96), (130, 129, 130)]


def strided(x):
    """The values of x in rows further apart than they are wide."""
    return x.new_full((x.shape[0], x.shape[1] + 7), float("nan"))[:, 3:-4].copy_(x)


class Problem:
    """Inputs of the building blocks, and the blocks themselves in plain PyTorch."""

    def __init__(self, n, m, d, dtype, *, normalize=False, scale=10.0, scale_dtype=torch.float32, offset=0.0):
        query, key = unit_features(n, m, d, dtype=torch.float64)
        if normalize:
            query, key = query * torch.rand(n, 1).add(0.5) * 3, key * torch.rand(m, 1).add(0.5) * 3
        self.query, self.key = strided((query + offset).to(dtype)), (key - offset).to(dtype)
        self.scale = torch.tensor(scale, dtype=scale_dtype)
        self.a = contrastive.inverse_norms(self.query, normalize)
        self.b = contrastive.inverse_norms(self.key, normalize)
        self.positives = torch.randint(0, m, (n,))
        self.positives[::5] = -1
        self.dtype = dtype

    def features(self, work):
        q, k = self.query.to(work), self.key.to(work)
        return (q, k) if self.a is None else (q * self.a.to(work)[:, None], k * self.b.to(work)[:, None])

    def rounded(self, x, work, gain=1.0):
        """What enters a product: the dtype of the features, unless `work` is for the truth."""
        return x if work == torch.float64 else (x * gain).to(self.dtype).to(work) / gain

    def logits(self, work):
        q, k = self.features(work)
        return self.scale.to(work) * (q @ k.T)

    def stats(self, work):
        s = self.logits(work)
        positive = s.gather(1, self.positives.clamp_min(0)[:, None])[:, 0]
        out = [positive[self.positives >= 0]]
        for dim in (1, 0):
            out += [s.logsumexp(dim), s.amax(dim), -torch.special.entr(s.softmax(dim)).sum(dim)]
        return out

    def feature_grad(self, total, x, inv, work):
        x, inv = x.to(work), None if inv is None else inv.to(work)[:, None]
        dot = (x * total).sum(1)
        scale = self.scale.to(work)
        grad = scale * total if inv is None else scale * inv * (total - inv * inv * dot[:, None] * x)
        return (grad if work == torch.float64 else grad.to(self.dtype)), dot

    def grads(self, work, row_max, row_log, col_max, col_log, u, v, w, query_extra, key_extra):
        q, k = self.features(work)
        s = self.logits(work)
        g = u.to(work)[:, None] * (s - row_max.to(work)[:, None] - row_log.to(work)[:, None]).exp()
        if v.numel():
            g = g + v.to(work) * (s - col_max.to(work) - col_log.to(work)).exp()
        hit = self.positives[:, None] == torch.arange(len(k))
        gain = (
            2.0**14 / max(u.abs().max(), v.abs().max() if v.numel() else 0)
            if self.dtype == torch.float16
            else 1.0
        )
        g = self.rounded(g.masked_fill(hit, 0), work, gain)
        weights = hit * w.to(work)[:, None]
        out = []
        for extra, x, inv, products, positives in (
            (query_extra, self.query, self.a, g @ self.rounded(k, work), weights @ k),
            (key_extra, self.key, self.b, g.T @ self.rounded(q, work), weights.T @ q),
        ):
            total = products + positives + (0 if extra is None else extra.to(work))
            out.extend(self.feature_grad(total, x, inv, work))
        return out[0], out[2], out[1], out[3]

    def sigmoid(self, work, bias, same, u):
        q, k = self.features(work)
        cosine = q @ k.T
        z = self.scale.to(work) * cosine + bias.to(work)
        x = torch.where(same, -z, z)
        g = torch.where(same, -u.to(work)[:, None], u.to(work)[:, None]) * x.sigmoid()
        gain = 2.0**14 / u.abs().max() if self.dtype == torch.float16 else 1.0
        low = self.rounded(g, work, gain)
        dquery = self.feature_grad(low @ self.rounded(k, work), self.query, self.a, work)[0]
        dkey = self.feature_grad(low.T @ self.rounded(q, work), self.key, self.b, work)[0]
        return softplus(x, threshold=1e9).sum(1), dquery, dkey, (g * cosine).sum(1), g.sum(1)


@pytest.fixture(params=[False, True], ids=["small-tiles", "large-tiles"])
def tile_size(request, monkeypatch):
    monkeypatch.setattr(tiles, "LARGE", 0 if request.param else 1 << 60)


def run_stats(p, columns=True, store_bytes=1 << 28):
    with interpreting(sanitize=True):
        *rows, positive, col_max, col_sum, col_moment, store = info_nce.info_nce_stats(
            p.query, p.key, p.scale, p.a, p.b, p.positives, columns, store_bytes
        )
    assert store.numel() == 0
    assert (positive[p.positives < 0] == -float("inf")).all()
    out = [positive[p.positives >= 0]]
    assert columns or col_max.numel() == col_sum.numel() == col_moment.numel() == 0
    for high, total, moment in (rows, (col_max, col_sum, col_moment))[: 1 + columns]:
        out += [high + total.log(), high, moment / total - total.log()]
    return out


def check_stats(p, **options):
    work = torch.promote_types(p.dtype, torch.float32)
    names = ("positive", "row lse", "row max", "row entropy", "col lse", "col max", "col entropy")
    got = run_stats(p, **options)
    for name, value, low, exact in zip(names, got, p.stats(work), p.stats(torch.float64), strict=False):
        assert_as_good(value, low, exact, name=name)


def check_grads(p, *, columns=True, store_bytes=1 << 28, extra=False, needs=(True, True)):
    n, m = len(p.query), len(p.key)
    work = torch.promote_types(p.dtype, torch.float32)
    _, row_lse, row_max, _, col_lse, col_max, _ = p.stats(torch.float64)
    row_log, col_log = (row_lse - row_max).to(work), (col_lse - col_max).to(work)
    row_max, col_max = row_max.to(work), col_max.to(work)
    u, v, w = torch.rand(n, dtype=work) / n, torch.rand(m, dtype=work) / n, torch.randn(n, dtype=work) / n
    if not columns:
        col_max, col_log, v = col_max[:0], col_log[:0], v[:0]
    extras = [torch.randn(x.shape, dtype=work) / n if extra else None for x in (p.query, p.key)]
    arguments = (row_max, row_log, col_max, col_log, u, v, w, *extras)
    low, exact = p.grads(work, *arguments), p.grads(torch.float64, *arguments)
    with interpreting(sanitize=True):
        got = info_nce.info_nce_grads(
            p.query,
            p.key,
            p.scale,
            p.a,
            p.b,
            p.positives,
            *arguments,
            torch.empty(0, dtype=torch.uint8),
            store_bytes,
            *needs,
        )
    names = ("dquery", "dkey", "query_dot", "key_dot")
    for name, value, lower, truth, need in zip(names, got, low, exact, needs * 2, strict=True):
        if need:
            assert_as_good(value, lower, truth, name=name)
        else:
            assert value.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_info_nce_blocks(size, dtype, normalize):
    p = Problem(*size[:2], size[2] + (normalize and size[2] == 1), dtype, normalize=normalize)
    check_stats(p)
    check_grads(p, extra=normalize)


@pytest.mark.usefixtures("tile_size")
@pytest.mark.parametrize("dtype", DTYPES)
def test_info_nce_blocks_with_every_tile(dtype):
    p = Problem(150, 140, 100, dtype, scale_dtype=torch.float64)
    check_stats(p)
    check_grads(p, columns=False)


@pytest.mark.parametrize("dtype", HALF)
def test_chunks_of_rows_and_splits_of_columns(dtype, monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK_ROWS", 70)
    monkeypatch.setattr(info_nce, "PARTIAL_TILES", 1)
    monkeypatch.setattr(info_nce, "PROGRAMS", 6)
    p = Problem(200, 170, 40, dtype)
    check_stats(p, store_bytes=0)
    check_grads(p, store_bytes=0)
    whole = run_stats(p)
    for a, b in zip(run_stats(p, store_bytes=0), whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_frozen_sides_cost_and_return_nothing(needs, dtype):
    check_grads(Problem(37, 45, 24, dtype, normalize=True), needs=needs)


def test_one_direction_has_no_columns():
    p = Problem(37, 70, 24, torch.bfloat16)
    check_stats(p, columns=False)


@pytest.mark.parametrize("normalize", [False, True])
def test_float64(normalize):
    p = Problem(37, 45, 24, torch.float64, normalize=normalize, scale=80.0, scale_dtype=torch.float64)
    check_stats(p)
    check_grads(p, extra=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scale", "offset"), [(100.0, 0.0), (1000.0, 0.0), (50.0, 0.8), (-100.0, 0.0), (1e-3, 0.0)], ids=str
)
def test_extreme_logits(dtype, scale, offset):
    """An offset makes every similarity very low, exponentials far below the range of float32."""
    p = Problem(70, 66, 33, dtype, scale=scale, offset=offset)
    assert offset == 0 or p.logits(torch.float64).max() < -500
    check_stats(p)
    check_grads(p)


def test_rows_far_below_the_largest_logit_keep_their_softmax():
    p = Problem(70, 66, 33, torch.float32, scale=100.0)
    p.query[::2] *= 1e-3
    p.query[1::2] *= 5
    check_stats(p)
    check_grads(p)


@pytest.mark.parametrize("dtype", HALF)
def test_repeated_positives_and_expanded_features(dtype):
    p = Problem(40, 50, 20, dtype)
    p.positives = torch.full((40,), 7)
    p.query = p.query[:1].expand(40, 20)
    check_stats(p)
    check_grads(p)
    p = Problem(40, 50, 20, dtype)
    p.query, p.key = p.query.T.contiguous().T, p.key[:, ::2].repeat_interleave(2, 1)[:, ::2].repeat(1, 2)
    check_stats(p)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5)])
def test_empty(n, m):
    query, key, scale = torch.empty(n, 8), torch.randn(m, 8), torch.tensor(2.0)
    with interpreting(sanitize=True):
        row_max, row_sum, _, positive, col_max, col_sum, _, _ = info_nce.info_nce_stats(
            query, key, scale, None, None, torch.empty(n, dtype=torch.int64), True, 0
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


def check_sigmoid(p, *, bias=-1.0, ids=False, needs=(True, True, True, True)):
    work = torch.promote_types(p.dtype, torch.float32)
    n, m = len(p.query), len(p.key)
    bias = torch.tensor([bias], dtype=work)
    u = torch.rand(n, dtype=work) / n
    index, query_ids, key_ids = p.positives, None, None
    if ids:
        index, query_ids, key_ids = None, torch.randint(0, 9, (n,)), torch.randint(0, 9, (m,))
    same = query_ids[:, None] == key_ids if ids else p.positives[:, None] == torch.arange(m)
    with interpreting(sanitize=True):
        got = sigmoid_loss.sigmoid_sweep(
            p.query, p.key, p.scale, bias, p.a, p.b, index, query_ids, key_ids, u, *needs
        )
    names = ("loss", "dquery", "dkey", "dscale", "dbias")
    low, exact = p.sigmoid(work, bias, same, u), p.sigmoid(torch.float64, bias, same, u)
    for name, value, lower, truth, need in zip(names, got, low, exact, (*needs, needs[3]), strict=True):
        if need:
            assert_as_good(value, lower, truth, name=name)
        else:
            assert value.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid_block(size, dtype, normalize):
    n, m, d = size
    scale = 1.0 if n == 1 else 10.0  # the rounding of one large logit is luck
    p = Problem(n, m, d + (normalize and d == 1), dtype, normalize=normalize, scale=scale)
    check_sigmoid(p, ids=normalize)


@pytest.mark.usefixtures("tile_size")
@pytest.mark.parametrize("dtype", HALF)
def test_sigmoid_block_with_every_tile(dtype):
    check_sigmoid(Problem(150, 140, 100, dtype), ids=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sigmoid_block_does_what_is_needed(dtype, monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK_ROWS", 40)
    monkeypatch.setattr(sigmoid_loss, "CHUNK_BYTES", 0)
    for needed in ((0,), (1,), (2,), (3,), (0, 1, 3), ()):
        p = Problem(70, 45, 20, dtype, normalize=True)
        check_sigmoid(p, needs=tuple(i in needed for i in range(4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -40.0), (100.0, 30.0), (0.0, 0.0)])
def test_sigmoid_block_at_extreme_logits(dtype, scale, bias):
    check_sigmoid(Problem(70, 66, 33, dtype, scale=scale), bias=bias)


def test_softplus_of_a_small_exponential_keeps_its_digits():
    p = Problem(1, 1, 16, torch.float32, scale=0.0)
    p.positives[:] = -1
    with interpreting():
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
    monkeypatch.setattr(torch.ops.vlmkernels, "sigmoid_sweep", sigmoid_loss.sigmoid_sweep)


def truth(op, query, key, scalars, dtype, dloss, **options):
    inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, *scalars)]
    loss = op(*inputs, **options)
    grads = torch.autograd.grad(loss, inputs, dloss.to(loss.dtype))
    if dtype != torch.float64:
        grads = [g.to(x.dtype) for g, x in zip(grads, (query, key, *scalars), strict=True)]
    return [loss.detach(), *grads]


CASES = {
    "clip": {},
    "normalised, smoothed, weighted": {"normalize": True, "label_smoothing": 0.1, "weight": torch.rand(70)},
    "one direction": {"symmetric": False, "reduction": "sum"},
    "indices": {
        "symmetric": False,
        "positives": torch.randint(0, 70, (70,)).index_fill(0, torch.arange(0, 70, 9), -100),
    },
    "ids": {"positives": (torch.randint(0, 20, (70,)), torch.randint(0, 20, (70,))), "reduction": "none"},
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
    x, y = torch.randn(size, dtype=dtypes[0]), torch.randn(size, dtype=dtypes[1])
    gate = torch.randn(1, 1, size[1] if per_channel else 1)
    mask = torch.rand(size[0]) > 0.4 if masked else None
    if masked:
        y = torch.where(mask[:, None], y, float("nan"))
    dout = torch.randn(size, dtype=torch.promote_types(*dtypes))
    with interpreting(sanitize=True):
        out = gated.gated_residual(x, strided(y), gate, mask)
        dy, dgate = gated.gated_residual_bwd(strided(dout), y, gate, mask, True, True)
    assert_as_good(
        out, gated_residual_fwd(x, y, gate, mask), gated_residual_fwd(x.double(), y.double(), gate, mask)
    )
    low = gated_residual_bwd(dout, y, gate, mask, True, True)
    exact = gated_residual_bwd(dout.double(), y.double(), gate.double(), mask, True, True)
    assert_as_good(dy, low[0], exact[0], name="dy")
    assert_as_good(dgate, low[1], exact[1], name="dgate")


def test_gated_residual_computes_what_is_needed_and_repeats_its_bits():
    x, gate = torch.randn(3, 41, 50).bfloat16(), torch.randn(50)
    with interpreting(sanitize=True):
        dy, dgate = gated.gated_residual_bwd(x[:1, :1].expand(3, 41, 50), x, gate, None, True, False)
        assert (dy.shape, dgate.numel()) == (x.shape, 0)
        dy, dgate = gated.gated_residual_bwd(x, x, gate, None, False, True)
        assert (dy.numel(), dgate.shape) == (0, gate.shape)
        assert torch.equal(dgate, gated.gated_residual_bwd(x, x, gate, None, True, True)[1])
        empty = gated.gated_residual_bwd(x[:0], x[:0], gate, None, True, True)
    assert torch.equal(empty[1], torch.zeros(50))


@pytest.mark.parametrize("gate", [0.0, 1e-30, 1e-4, -0.3, 20.0])
def test_gated_residual_at_small_gates_keeps_relative_accuracy(gate):
    x, y, gate = torch.zeros(4, 64), torch.randn(4, 64), torch.tensor(gate)
    with interpreting(sanitize=True):
        out = gated.gated_residual(x, y, gate, None)
    assert torch.allclose(out.double(), gate.double().tanh() * y.double(), rtol=1e-6, atol=0)
