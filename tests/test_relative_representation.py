"""Relative representations, against the definition in float64 and a dense composition of PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.recorded import RECORDERS, recorded
from vlmkernels import reference
from vlmkernels.reference.relative_representation import relative_representation_fwd
from vlmkernels.testing import assert_as_good

NATIVE = "reference" not in vlmkernels.info()["ops"]["relative_representation"]["CPU"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1, 1), (3, 40, 5), (7, 300, 64), (20, 100, 33), (2, 2000, 16)]  # rows, anchors, width
raw = torch.ops.vlmkernels.relative_representation


def on_cuda(x, anchors, **options):
    return tuple(y.cpu() for y in vlmkernels.relative_representation(x.cuda(), anchors.cuda(), **options))


OPS = {
    "dispatched": vlmkernels.relative_representation,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}


def sample(rows, anchors, width, dtype=torch.float32):
    return torch.randn(rows, width).to(dtype), torch.randn(anchors, width).to(dtype)


def dense(x, anchors, k, p):
    """The published procedure: keep the k largest, raise to a power, normalise; [Q, n]."""
    s = F.normalize(x) @ F.normalize(anchors).T
    values, indices = s.topk(min(k, len(anchors)), dim=1)
    kept = torch.zeros_like(s).scatter(1, indices, values.clamp_min(0))
    return F.normalize(kept**p, dim=1, eps=1e-300)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 800])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_indices(op, dtype, k, shape):
    x, anchors = sample(*shape, dtype)
    for p in (8, 1, 2.5):
        values, indices = OPS[op](x, anchors, k=k, p=p)
        exact, wanted = reference.relative_representation(x.double(), anchors.double(), k=k, p=p)
        wide = torch.promote_types(dtype, torch.float32)
        low, _ = reference.relative_representation(x.to(wide), anchors.to(wide), k=k, p=p)
        assert torch.equal(indices, wanted)
        assert_as_good(values, low, exact)
        assert (indices.diff(dim=1) > 0).all()


@pytest.mark.parametrize("k", [1, 12, 100])
@pytest.mark.parametrize("p", [1, 3, 8])
def test_is_the_published_procedure(k, p):
    x, anchors = sample(9, 60, 12, torch.float64)
    values, indices = vlmkernels.relative_representation(x, anchors, k=k, p=p)
    got = torch.zeros(9, 60, dtype=torch.float64).scatter(1, indices, values)
    torch.testing.assert_close(got, dense(x, anchors, k, p), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(values.norm(dim=1), torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 800), (40, 131), (2, 2048)], ids=str)
@pytest.mark.parametrize("p", [0.5, 1, 2, 3, 8, 13, 7.3, 300])
def test_powers(dtype, shape, p):
    similarities = (torch.randn(shape) * 0.3).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    exact = relative_representation_fwd(similarities.double(), p)
    got = raw(similarities, p)
    assert got.dtype == wide
    # PyTorch's own powers are more exact than a product of p / 2 rounded factors may be
    assert (got.double() - exact).abs().max() <= (2 * p + 8) * torch.finfo(wide).eps


def test_small_similarities_do_not_underflow():
    similarities = torch.tensor([[2e-6, 1e-6, -1.0], [2e-30, 1e-30, 0.0], [1e-40, 1e-40, -1e-40]])
    got = raw(similarities, 8.0)
    first = F.normalize(torch.tensor([1, 0.5**8, 0]), dim=0)
    torch.testing.assert_close(got[:2], first.expand(2, 3))
    assert got[2].isfinite().all()


@pytest.mark.parametrize("p", [8, 3, 2.5])
def test_without_a_positive_similarity_a_row_is_zero(p):
    anchors = F.normalize(torch.rand(20, 6))
    x = torch.cat([-anchors[:3], torch.zeros(1, 6), anchors[:1]])
    values, indices = vlmkernels.relative_representation(x, anchors, k=5, p=p)
    assert torch.equal(values[:4], torch.zeros(4, 5))
    assert indices[3].tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(values[4].norm(), torch.tensor(1.0))


def test_of_equally_near_anchors_those_of_lower_index_are_kept():
    anchors = torch.eye(4).repeat(5, 1)
    _, indices = vlmkernels.relative_representation(torch.eye(4), anchors, k=3)
    assert indices.tolist() == [[i, i + 4, i + 8] for i in range(4)]


def test_norms_of_the_inputs_do_not_count():
    x, anchors = sample(6, 50, 10, torch.float64)
    got = vlmkernels.relative_representation(x * 1e4, anchors * torch.logspace(-3, 3, 50)[:, None], k=9)
    want = vlmkernels.relative_representation(x, anchors, k=9)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0])


def test_nan_is_kept_last_and_not_hidden():
    x, anchors = sample(3, 12, 8)
    anchors[2] = torch.nan
    values, indices = vlmkernels.relative_representation(x, anchors, k=11)
    assert values.isfinite().all()
    assert (indices != 2).all()
    values, _ = vlmkernels.relative_representation(x, anchors, k=12)
    assert values.isnan().all()
    x[1, 3] = torch.nan
    anchors[2] = 1
    values, _ = vlmkernels.relative_representation(x, anchors, k=5)
    assert values.isnan().all(1).tolist() == [False, True, False]
    for at in (0, 20, 36):
        similarities = torch.rand(2, 37)
        similarities[0, at] = torch.nan
        assert raw(similarities, 8.0).isnan().all(1).tolist() == [True, False]
        assert raw(similarities, 2.5).isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)], ids=str)
def test_empty(shape):
    x, anchors = sample(*shape)
    values, indices = vlmkernels.relative_representation(x, anchors, k=4)
    assert values.shape == indices.shape == (shape[0], min(4, shape[1]))
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert (values == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype):
    similarities = torch.rand(24, 33).to(dtype)
    for view in (
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:1].expand(24, 33),
        lambda x: x[:, 3:],
    ):
        got, want = raw(view(similarities), 8.0), raw(view(similarities).contiguous(), 8.0)
        if NATIVE:
            assert torch.equal(got, want)
        torch.testing.assert_close(got, want)


def test_results_have_no_gradient():
    x, anchors = sample(5, 20, 7)
    values, indices = vlmkernels.relative_representation(x.requires_grad_(), anchors.requires_grad_(), k=3)
    assert not values.requires_grad
    assert not indices.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.once
def test_registration(dtype):
    for similarities in (torch.rand(6, 8).to(dtype), torch.rand(8, 6).to(dtype).T, torch.rand(0, 3)):
        torch.library.opcheck(raw.default, (similarities, 8.0))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(x, anchors):
        return vlmkernels.relative_representation(x, anchors, k=9, p=3.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 16, 8), (9, 33, 12)):
        inputs = sample(*shape)
        torch.testing.assert_close(compiled(*inputs), step(*inputs))


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.once
def test_recorded(recorder):
    class Relative(torch.nn.Module):
        def forward(self, x, anchors):
            return vlmkernels.relative_representation(x, anchors, k=4)

    dynamic = [{0: torch.export.Dim("rows", min=2)}, {0: torch.export.Dim("anchors", min=5)}]
    module = recorded(recorder, Relative(), sample(6, 9, 5), dynamic)
    inputs = sample(40, 30, 5)
    for got, want in zip(module(*inputs), Relative()(*inputs), strict=True):
        assert torch.equal(got, want)


def test_autocast_changes_nothing():
    x, anchors = sample(5, 30, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = vlmkernels.relative_representation(x, anchors, k=6)
    for ours, plain in zip(got, vlmkernels.relative_representation(x, anchors, k=6), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.skipif(not NATIVE, reason="PyTorch computes elements of a vector and others differently")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_each_other(dtype):
    similarities = torch.rand(50, 37).to(dtype)
    for p in (8.0, 2.5):
        rows = [raw(similarities[i : i + 1], p) for i in range(50)]
        assert torch.equal(raw(similarities, p), torch.cat(rows))


def test_errors_name_every_invalid_argument():
    x, anchors = torch.zeros(3, 4), torch.zeros(5, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^relative_representation: ") as caught:
        vlmkernels.relative_representation(x, anchors, k=0, p=-1.0)
    for part in (
        "anchors must be [n, D] with the D of x (3, 4), got (5, 2)", "k must be at least 1, got 0",
        "p must be positive and finite, got -1.0", "anchors torch.int32",
    ):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"x must be \[Q, D\], got \(3,\)"):
        vlmkernels.relative_representation(torch.zeros(3), anchors)
    with pytest.raises(ValueError, match="p must be positive and finite, got nan"):
        vlmkernels.relative_representation(x, torch.zeros(2, 4), p=float("nan"))
    with pytest.raises(TypeError, match="relative_representation: k must be int, got float"):
        vlmkernels.relative_representation(x, torch.zeros(2, 4), k=2.5)
    for values in ((torch.zeros(3), 8.0), (x, 0.0), (x, float("inf"))):
        with pytest.raises(ValueError, match="relative_representation: "):
            raw(*values)
