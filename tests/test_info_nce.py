import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from vlmkernels import reference
from vlmkernels.ops import _pairwise_small
from vlmkernels.testing import assert_as_good, assert_op_as_good, result_and_gradients, unit_features


@pytest.fixture(autouse=True)
def _kernels_at_every_size(monkeypatch):
    monkeypatch.setattr(_pairwise_small, "LIMIT", 0)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ON = {"dispatched": "cpu", **({"cuda": "cuda"} if torch.cuda.is_available() else {})}
NATIVE = "reference" not in vlmkernels.info()["ops"]["info_nce"]["CPU"]
CAPS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def op_on(device):
    def move(value):
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def op(*tensors, **options):
        return vlmkernels.info_nce(*map(move, tensors), **{k: move(v) for k, v in options.items()}).cpu()

    return op


def judge(query, key, scale, device="cpu", caps=None, **options):
    """Result and all gradients against the reference; the result per row where the options allow it."""
    store = {"store_bytes": options.pop("store_bytes")} if "store_bytes" in options else {}
    tensors = [t.detach().requires_grad_() for t in (query, key, torch.as_tensor(scale))]
    run = op_on(device)
    assert_op_as_good(
        lambda *t, **kw: run(*t, **kw, **store), reference.info_nce, tensors, caps=caps, **options
    )


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 5), (37, 33), (130, 64), (300, 70)])
def test_forward_and_gradients(device, dtype, scale, rows, dim):
    query, key = unit_features(rows, rows, dim, dtype=dtype)
    caps = {1: CAPS[dtype], 2: CAPS[dtype]} if dtype in CAPS and scale < 100 and rows > 1 else None
    for store_bytes in (0, 2**28):
        judge(query, key, scale, ON[device], caps, reduction="none", store_bytes=store_bytes)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(device, dtype, reduction):
    query, key = unit_features(260, 260, 40, dtype=dtype)
    judge(query, key, 10.0, ON[device], reduction=reduction)
    judge(query, key, 10.0, ON[device], reduction=reduction, symmetric=False)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("scale", [1e-6, 1e-4, -1e-3, 1e-2])
def test_small_scale(device, scale):
    """The gradient of the scale is a sum over similarities, however close to each other the logits are."""
    query, key = unit_features(300, 300, 40)
    ids, some = torch.arange(300) // 2, torch.arange(300).where(torch.rand(300) > 0.2, -100)
    for options in (
        {}, {"symmetric": False}, {"normalize": True}, {"label_smoothing": 0.1}, {"weight": torch.rand(300)},
        {"reduction": "none"}, {"reduction": "sum", "store_bytes": 0}, {"positives": (ids, ids)},
        {"positives": (ids, ids), "label_smoothing": 0.1}, {"positives": some, "symmetric": False},
    ):  # fmt: skip
        judge(query, key, scale, ON[device], **options)


def options_table():
    index = torch.randint(0, 400, (150,))
    index[::7] = -100
    weight = torch.rand(150)
    weight[3] = 0
    ids = (torch.randint(0, 60, (150,)), torch.randint(0, 70, (400,)))
    square = (torch.randint(0, 60, (150,)), torch.randint(0, 70, (150,)))
    return {
        "more keys": (400, {"symmetric": False}),
        "more keys, normalised": (400, {"symmetric": False, "normalize": True}),
        "index": (400, {"symmetric": False, "positives": index}),
        "index, smoothed, weighted": (
            400,
            {
                "symmetric": False,
                "positives": index,
                "label_smoothing": 0.1,
                "weight": weight,
                "reduction": "none",
            },
        ),
        "ids": (400, {"positives": ids}),
        "ids, one direction, smoothed, normalised": (
            400,
            {"positives": ids, "symmetric": False, "label_smoothing": 0.2, "normalize": True},
        ),
        "ids, weighted, per row": (
            150,
            {"positives": square, "weight": weight, "reduction": "none", "label_smoothing": 0.1},
        ),
        "weighted, smoothed, normalised": (
            150,
            {"weight": weight, "label_smoothing": 0.1, "normalize": True},
        ),
        "weighted sum": (150, {"weight": weight, "reduction": "sum"}),
        "normalised": (150, {"normalize": True, "reduction": "none"}),
    }


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", options_table())
def test_options(device, dtype, case):
    cols, options = options_table()[case]
    query, key = unit_features(150, cols, 48, dtype=dtype)
    for store_bytes in (0, 2**28):
        judge(3 * query, 2 * key, 8.0, ON[device], store_bytes=store_bytes, **options)


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_open_clips_formula(symmetric):
    query, key = unit_features(77, 77, 32)
    logits = 25.0 * query @ key.T
    target = torch.arange(77)
    want = F.cross_entropy(logits, target)
    if symmetric:
        want = (want + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(vlmkernels.info_nce(query, key, 25.0, symmetric=symmetric), want)
    smooth = vlmkernels.info_nce(query, key, 25.0, symmetric=False, label_smoothing=0.1)
    torch.testing.assert_close(smooth, F.cross_entropy(logits, target, label_smoothing=0.1))


def test_ids_equal_supcon_targets():
    query, key = unit_features(20, 30, 16)
    query_ids, key_ids = torch.randint(0, 6, (20,)), torch.randint(0, 6, (30,))
    same = (query_ids[:, None] == key_ids).float()
    log_p = (5 * query @ key.T).log_softmax(1)
    want = -(same / same.sum(1, keepdim=True).clamp_min(1) * log_p).sum(1)
    got = vlmkernels.info_nce(
        query, key, 5.0, positives=(query_ids, key_ids), symmetric=False, reduction="none"
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("store_bytes", [0, 2**28])
def test_extreme_logits(dtype, store_bytes):
    query, key = unit_features(260, 300, 24, dtype=dtype)
    uneven, spread = query.clone(), key.clone()
    uneven[::3] *= 60  # rows far below the tile's maximum beside rows with logits of thousands
    spread[::5] *= 20
    judge(uneven, spread, 10.0, symmetric=False, store_bytes=store_bytes)
    judge(uneven, spread[:260], 10.0, reduction="none", store_bytes=store_bytes)
    judge(-query, key, 100.0, symmetric=False, store_bytes=store_bytes)
    low = (3 + 0.2 * torch.rand(40, 8)).to(dtype)
    judge(low, -low.flip(0), 100.0, store_bytes=store_bytes)  # all logits about -7700
    judge(query[:40] * 0, key[:40], 5.0, store_bytes=store_bytes)


def test_random_init_at_scale_100_stays_finite():
    """A fixed bound 1 / T instead of the true maximum underflows here for 9 rows in 10."""
    query, key = (F.normalize(torch.randn(512, 1024), dim=-1) for _ in range(2))
    judge(query, key, 100.0, reduction="none")


def test_rounded_logits_are_rejected():
    """The tolerance tells a kernel that rounds logits to bf16 from one that does not."""
    query, key = unit_features(256, 256, 64, dtype=torch.bfloat16, similarity=0.3)

    def rounding(q, k, scale):
        logits = (scale * (q @ k.T)).to(torch.bfloat16).float()
        target = torch.arange(len(q))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    tensors = [query.requires_grad_(), key.requires_grad_(), torch.tensor(100.0, requires_grad=True)]
    with pytest.raises(AssertionError, match="error"):
        assert_op_as_good(rounding, reference.info_nce, tensors)
    assert_op_as_good(vlmkernels.info_nce, reference.info_nce, tensors)


def test_scale_gradient_at_zero_and_negative_scale():
    query, key = unit_features(30, 30, 8)
    judge(query, key, 0.0)
    judge(query, key, -3.0)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_scale_gradient_has_its_shape_and_dtype(shape):
    query, key = unit_features(9, 9, 8, dtype=torch.bfloat16)
    scale = torch.full(shape, 4.0, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(vlmkernels.info_nce(query, key, scale), scale)
    assert grad.shape == scale.shape
    assert grad.dtype == torch.float64


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True, "label_smoothing": 0.2}, {"reduction": "none"}], ids=str
)
def test_gradcheck(options):
    query, key = (3 * t for t in unit_features(5, 5, 4, dtype=torch.float64))
    tensors = [t.requires_grad_() for t in (query, key, torch.tensor(2.0, dtype=torch.float64))]
    for store_bytes in (0, 2**20):
        assert torch.autograd.gradcheck(
            lambda *t, s=store_bytes: vlmkernels.info_nce(*t, store_bytes=s, **options), tensors
        )
    ids = (torch.tensor([0, 1, 1, 2, 9]), torch.tensor([1, 0, 2, 1, 7]))
    assert torch.autograd.gradcheck(lambda *t: vlmkernels.info_nce(*t, positives=ids), tensors)
    index = torch.tensor([4, -100, 0, 2, 2])
    assert torch.autograd.gradcheck(
        lambda *t: vlmkernels.info_nce(*t, positives=index, symmetric=False), tensors
    )


def test_second_derivative_is_refused():
    query, key = unit_features(5, 5, 4)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(vlmkernels.info_nce(query, key, 2.0), query, create_graph=True)
    with pytest.raises(RuntimeError, match="info_nce has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.once
def test_registration(permuted):
    query, key = unit_features(6, 6, 6)
    if permuted:
        query, key = query.T, key.T
    op, bwd = torch.ops.vlmkernels.info_nce.default, torch.ops.vlmkernels.info_nce_bwd.default
    scale = torch.tensor(3.0, requires_grad=True)
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    ids = (torch.arange(6) // 2, torch.arange(6) // 3)
    for inputs in (
        (query, key, scale, None, None, None, True, 0.0, False, "mean", 2**20),
        (query, key, scale, None, None, None, True, 0.1, True, "none", 0),
        (query, key, scale, ids[0], ids[1], torch.rand(6), True, 0.0, False, "sum", 2**20),
        (
            query,
            key.detach(),
            scale,
            torch.tensor([1, 2, -100, 0, 5, 5]),
            None,
            None,
            False,
            0.0,
            False,
            "mean",
            2**20,
        ),
    ):
        torch.library.opcheck(op, inputs)
        with torch.no_grad():
            loss, *saved = op(*inputs)
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        torch.library.opcheck(
            bwd, (torch.ones_like(loss), *plain[:6], *saved, *plain[6:], [True, True, True])
        )
        torch.library.opcheck(
            bwd, (torch.ones_like(loss), *plain[:6], *saved, *plain[6:], [False, True, False])
        )


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(query, key, scale):
        return vlmkernels.info_nce(query, key, scale, label_smoothing=0.1) + vlmkernels.info_nce(
            query, key, 2.0, normalize=True
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 140):
        tensors = [*unit_features(rows, rows, 16), torch.tensor(7.0)]
        tensors = [t.requires_grad_() for t in tensors]
        for got, want in zip(
            result_and_gradients(compiled, tensors), result_and_gradients(step, tensors), strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.once
def test_export():
    class Loss(torch.nn.Module):
        def forward(self, query, key):
            return vlmkernels.info_nce(query, key, 5.0)

    query, key = unit_features(6, 6, 8)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Loss(), (query, key), dynamic_shapes=({0: rows}, {0: rows}))
    query, key = unit_features(300, 300, 8)
    torch.testing.assert_close(program.module()(query, key), vlmkernels.info_nce(query, key, 5.0))


def test_shapes_on_the_meta_device():
    query, key = (torch.empty(300, 8, device="meta", requires_grad=True) for _ in range(2))
    loss = vlmkernels.info_nce(query, key, 5.0)
    loss.backward()
    assert loss.shape == ()
    assert query.grad.shape == key.grad.shape == (300, 8)


def test_autocast_casts_features_only():
    query, key = unit_features(40, 40, 16)
    scale = torch.tensor(30.0, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = vlmkernels.info_nce(query.requires_grad_(), key, scale)
    want = vlmkernels.info_nce(query.bfloat16(), key.bfloat16(), scale)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got, query)
    assert grad.dtype == torch.float32
    double = query.detach().double()
    with torch.autocast("cpu", torch.bfloat16):
        exact = vlmkernels.info_nce(double, key.double(), 30.0)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, vlmkernels.info_nce(double, key.double(), 30.0))


@pytest.mark.parametrize("dim", [0, 6])
@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (0, 5), (1, 1), (1, 300), (130, 300)])
def test_empty_and_single(rows, cols, dim):
    shapes = ((rows, dim), (cols, dim), ())
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    ids = (torch.arange(rows), torch.arange(cols))
    for options in ({"symmetric": False}, {"positives": ids, "label_smoothing": 0.1}):
        ops = (vlmkernels.info_nce, reference.info_nce)
        got, want = (result_and_gradients(op, tensors, **options) for op in ops)
        torch.testing.assert_close(got, want)
        if rows == 0:
            assert got[0] == 0


def test_nothing_counted_gives_zero_and_zero_gradients():
    tensors = [t.requires_grad_() for t in (torch.randn(4, 6), torch.randn(4, 6), torch.tensor(2.0))]
    for options in (
        {"positives": torch.full((4,), -100), "symmetric": False},
        {"weight": torch.zeros(4)},
        {"positives": (torch.arange(4), torch.arange(4) + 10)},
    ):
        for each in result_and_gradients(vlmkernels.info_nce, tensors, **options):
            assert (each == 0).all()


def test_views_and_frozen_inputs():
    query, key = torch.randn(12, 40).T.requires_grad_(), torch.randn(1, 12).expand(40, 12)
    scale = torch.tensor(2.0)
    got = result_and_gradients(vlmkernels.info_nce, (query, key, scale), normalize=True)
    want = result_and_gradients(reference.info_nce, (query, key, scale), normalize=True)
    torch.testing.assert_close(got[:2], want[:2])
    assert got[2] is None
    assert got[3] is None
    query, key, scale = (
        torch.randn(40, 12),
        torch.randn(40, 12, requires_grad=True),
        torch.tensor(2.0, requires_grad=True),
    )
    got = result_and_gradients(vlmkernels.info_nce, (query, key, scale))
    want = result_and_gradients(reference.info_nce, (query, key, scale))
    torch.testing.assert_close(got[2:], want[2:])
    strided = torch.randn(40, 24)[:, ::2]
    torch.testing.assert_close(vlmkernels.info_nce(strided, key, 1.0), reference.info_nce(strided, key, 1.0))


def test_gradients_twice_from_one_graph():
    query, key = (t.requires_grad_() for t in unit_features(140, 140, 16))
    loss = vlmkernels.info_nce(query, key, 9.0)
    first = torch.autograd.grad(loss, (query, key), retain_graph=True)
    second = torch.autograd.grad(loss, (query, key))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_deterministic_for_any_number_of_threads(for_thread_counts, dtype, smoothing):
    options = {"label_smoothing": smoothing, "store_bytes": 2**20}
    query, key = unit_features(1100, 1100, 256, dtype=dtype)
    tensors = [query.requires_grad_(), key.requires_grad_(), torch.tensor(20.0, requires_grad=True)]

    def run():
        return result_and_gradients(vlmkernels.info_nce, tensors, **options)

    first, *others = [run(), run(), *(for_thread_counts(run) if NATIVE else ())]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not NATIVE, reason="the reference is dense by design")
def test_nan_is_not_hidden():
    for dtype in (torch.float32, torch.bfloat16):
        query, key = unit_features(200, 200, 16, dtype=dtype)
        query[150, 3] = float("nan")
        query.requires_grad_()
        loss, dquery, *_ = result_and_gradients(vlmkernels.info_nce, (query, key, torch.tensor(5.0)))
        assert loss.isnan()
        assert dquery[150].isnan().any()


@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads):
    query, key = unit_features(1024, 1024, 128)
    assert busy_threads(lambda: vlmkernels.info_nce(query, key, 10.0)) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(4, 6)}, r"query \(4, 5\) and key \(4, 6\)"),
        (
            {"key": torch.zeros(4, 5, dtype=torch.float64)},
            "the same dtype, got query torch.float32, key torch.float64",
        ),
        ({"key": torch.zeros(3, 5)}, "M must equal N when symmetric, got N = 4 and M = 3"),
        ({"key": torch.zeros(3, 5), "symmetric": False}, "M must be at least N, got N = 4 and M = 3"),
        ({"positives": torch.zeros(4, dtype=torch.int64)}, "need symmetric=False"),
        (
            {"positives": torch.zeros(3, dtype=torch.int64), "symmetric": False},
            r"positives must be int64 of shape \(4,\)",
        ),
        ({"positives": torch.zeros(4), "symmetric": False}, "int64"),
        (
            {"positives": (torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))},
            r"positives\[1\]",
        ),
        ({"weight": torch.ones(3)}, r"weight must be \[N\] = \(4,\), got \(3,\)"),
        ({"reduction": "avg"}, "'avg'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"store_bytes": -1}, "store_bytes must be in"),
        ({"scale": torch.ones(2)}, r"scale must be a float or .* one element, got torch.float32 \(2,\)"),
        ({"key": torch.zeros(0, 5), "symmetric": False}, "key must have rows, since query has 4"),
        (
            {"query": torch.zeros(4, 5, dtype=torch.int64)},
            "float32, float64, bfloat16 or float16, got query torch.int64",
        ),
        ({"query": torch.zeros(5)}, r"query must be \[N, D\]"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {"query": torch.zeros(4, 5), "key": torch.zeros(4, 5), "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        vlmkernels.info_nce(**{**good, **change})


def test_positive_out_of_range_is_an_index_error():
    for bad in (-1, 4, -99):
        with pytest.raises(IndexError, match=r"\[0, M = 4\) or -100"):
            vlmkernels.info_nce(
                torch.zeros(2, 5), torch.zeros(4, 5), 1.0, positives=torch.tensor([0, bad]), symmetric=False
            )


def test_all_faults_in_one_error():
    with pytest.raises(ValueError, match=r"(?s)label_smoothing.*store_bytes"):
        vlmkernels.info_nce(torch.zeros(2, 5), torch.zeros(2, 5), 1.0, label_smoothing=2.0, store_bytes=-1)


def test_reference_forward_is_the_definition():
    """The reference's raw backward against autograd through its forward, in float64."""
    query, key = unit_features(21, 21, 9, dtype=torch.float64)
    scale = torch.tensor(6.0, dtype=torch.float64)
    ids = (torch.randint(0, 7, (21,)), torch.randint(0, 7, (21,)))
    args = (None, True, 0.1, True, "mean")
    from vlmkernels.reference.info_nce import info_nce_bwd, info_nce_fwd

    loss = info_nce_fwd(query, key, scale, *ids, *args)
    grads = info_nce_bwd(torch.ones_like(loss), query, key, scale, *ids, *args, [True] * 3)
    leaves = [t.clone().requires_grad_() for t in (query, key, scale)]
    want = torch.autograd.grad(
        reference.info_nce(*leaves, positives=ids, label_smoothing=0.1, normalize=True), leaves
    )
    for got, exact in zip(grads, want, strict=True):
        assert_as_good(got, exact, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_problems(monkeypatch, dtype):
    """As users meet them; tests/test_pairwise_small.py has the rest."""
    monkeypatch.undo()
    query, key = unit_features(37, 37, 33, dtype=dtype)
    for options in ({}, {"label_smoothing": 0.1, "normalize": True}, {"symmetric": False}):
        judge(3 * query, 2 * key, 14.3, **options)


@pytest.mark.skipif(not NATIVE, reason="torch splits a sum by the number of threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_rows_are_deterministic_for_any_number_of_threads(for_thread_counts, dtype):
    query, key = (t.requires_grad_() for t in unit_features(40_000, 60, 8, dtype=dtype))
    options = {"positives": torch.randint(0, 60, (40_000,)), "symmetric": False, "weight": torch.rand(40_000)}
    tensors = (query, key, torch.tensor(20.0, requires_grad=True))
    first, *others = for_thread_counts(lambda: result_and_gradients(vlmkernels.info_nce, tensors, **options))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
