"""Products of sparse rows, against the definition in float64 and the dense product."""

import pytest
import torch

import vlmkernels
from tests.recorded import RECORDERS, recorded
from vlmkernels import reference
from vlmkernels.testing import assert_as_good

NATIVE = "reference" not in vlmkernels.info()["ops"]["relative_similarity"]["CPU"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# images, their values, texts, their values, anchors
SHAPES = [
    (1, 1, 1, 1, 1), (1, 5, 40, 7, 12), (3, 20, 2, 31, 60), (40, 13, 1, 13, 500), (17, 9, 33, 8, 10),
    (50, 64, 70, 60, 3000), (16, 300, 16, 300, 301), (2, 800, 5, 800, 100_000),
]  # fmt: skip
raw = torch.ops.vlmkernels.relative_similarity


def on_cuda(image_rep, text_rep):
    return vlmkernels.relative_similarity(
        *(tuple(x.cuda() for x in rep) for rep in (image_rep, text_rep))
    ).cpu()


OPS = {
    "dispatched": vlmkernels.relative_similarity,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}


def rep(rows, k, anchors, dtype=torch.float32):
    """values [rows, k] and indices [rows, k], ascending."""
    indices = torch.stack([torch.randperm(anchors)[:k].sort().values for _ in range(rows)])
    return torch.randn(rows, k).to(dtype), indices.reshape(rows, k)


def dense(image_rep, text_rep, anchors):
    rows = [
        torch.zeros(len(values), anchors, dtype=torch.float64).scatter(1, indices, values.double())
        for values, indices in (image_rep, text_rep)
    ]
    return rows[0] @ rows[1].T


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(op, dtype, shape):
    q, k, c, m, n = shape
    image, text = rep(q, k, n, dtype), rep(c, m, n, dtype)
    got = OPS[op](image, text)
    wide = torch.promote_types(dtype, torch.float32)
    low, exact = (
        reference.relative_similarity(*((values.to(to), indices) for values, indices in (image, text)))
        for to in (wide, torch.float64)
    )
    assert_as_good(got, low, exact)
    torch.testing.assert_close(exact, dense(image, text, n))


def test_equals_the_dense_product_exactly():
    """Of small integers, whose sums are exact: no entry is left out or counted twice."""
    for q, k, c, m, n in SHAPES:
        (_, i), (_, j) = image, text = rep(q, k, n), rep(c, m, n)
        image, text = ((torch.randint(-8, 9, x.shape).float(), x) for x in (i, j))
        got = vlmkernels.relative_similarity(image, text)
        assert torch.equal(got.double(), dense(image, text, n))
        assert torch.equal(vlmkernels.relative_similarity(text, image), got.T)


@pytest.mark.parametrize("far", [2**20, 2**31 + 5, 2**62, 2**63 - 1])
def test_indices_of_any_size(far):
    image = torch.tensor([[1.0, 2, 3]]), torch.tensor([[0, 7, far]])
    text = torch.tensor([[5.0, 7], [1, 1], [4, 9]]), torch.tensor([[0, far], [far - 1, far], [7, 8]])
    assert vlmkernels.relative_similarity(image, text).tolist() == [[26, 3, 8]]
    assert vlmkernels.relative_similarity(text, image).flatten().tolist() == [26, 3, 8]


def test_of_relative_representations_are_cosines():
    x, anchors = torch.randn(6, 10), torch.randn(50, 10)
    own = vlmkernels.relative_representation(x, anchors, k=20)
    got = vlmkernels.relative_similarity(own, own)
    torch.testing.assert_close(got.diag(), torch.ones(6))
    torch.testing.assert_close(got, got.T)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_hidden(bad):
    """As in the dense product, where each is multiplied with something in every column."""
    for shape in ((30, 5, 40, 6, 100), (40, 5, 3, 6, 100), (2, 5, 40, 6, 100)):
        q, k, c, m, n = shape
        image, text = rep(q, k, n), rep(c, m, n)
        image[0][1, 3], text[0][2, 5] = bad, bad
        got = vlmkernels.relative_similarity(image, text)
        finite = torch.ones(q, c, dtype=torch.bool)
        finite[1], finite[:, 2] = False, False
        assert torch.equal(got.isfinite(), finite)


def test_a_side_without_anchors_does_not_hide_them():
    damaged, none = (torch.full((2, 3), torch.nan), torch.arange(3).expand(2, 3)), rep(4, 0, 9)
    assert vlmkernels.relative_similarity(damaged, none).isnan().all()
    assert vlmkernels.relative_similarity(none, damaged).isnan().all()


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 3, 9), (4, 3, 0, 3, 9), (4, 0, 5, 3, 9), (4, 3, 5, 0, 9), (0, 0, 0, 0, 9)]
)
def test_empty(shape):
    q, k, c, m, _ = shape
    image, text = ((torch.ones(r, w), torch.arange(w).expand(r, w)) for r, w in ((q, k), (c, m)))
    got = vlmkernels.relative_similarity(image, text)
    assert torch.equal(got, torch.zeros(q, c))
    assert got.dtype == torch.float32


@pytest.mark.parametrize("ours", DTYPES, ids=str)
@pytest.mark.parametrize("theirs", DTYPES, ids=str)
def test_dtypes_of_both_sides_may_differ(ours, theirs):
    (v, i), (w, j) = rep(5, 9, 20), rep(7, 8, 20)
    image, text = (v.to(ours), i), (w.to(theirs), j)
    got = vlmkernels.relative_similarity(image, text)
    wide = torch.promote_types(torch.promote_types(ours, theirs), torch.float32)
    assert got.dtype == wide
    torch.testing.assert_close(got.double(), dense(image, text, 20), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype):
    image, text = rep(20, 12, 40, dtype), rep(30, 9, 40, dtype)
    for view in (
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:1].expand(20, -1),
    ):
        same = [tuple(view(x) for x in pair) for pair in (image, text)]
        plain = [tuple(x.contiguous() for x in pair) for pair in same]
        assert torch.equal(vlmkernels.relative_similarity(*same), vlmkernels.relative_similarity(*plain))


def test_results_have_no_gradient():
    (v, i), (w, j) = rep(5, 9, 20), rep(7, 8, 20)
    got = vlmkernels.relative_similarity((v.requires_grad_(), i), (w.requires_grad_(), j))
    assert not got.requires_grad


def test_a_pair_does_not_depend_on_the_others():
    """Nor on which side has more rows, whatever the kernel makes of them."""
    image, text = rep(37, 30, 90), rep(50, 40, 90)
    whole = vlmkernels.relative_similarity(image, text)
    for i in (0, 15, 16, 36):
        row = tuple(x[i : i + 1] for x in image)
        torch.testing.assert_close(vlmkernels.relative_similarity(row, text), whole[i : i + 1])
    for c in (0, 31, 49):
        column = tuple(x[c : c + 1] for x in text)
        torch.testing.assert_close(vlmkernels.relative_similarity(image, column), whole[:, c : c + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.once
def test_registration(dtype):
    image, text = rep(6, 5, 20, dtype), rep(4, 7, 20, dtype)
    torch.library.opcheck(raw.default, (*image, *text))
    permuted = [x.T.contiguous().T for x in (*image, *text)]
    torch.library.opcheck(raw.default, tuple(permuted))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(v, i, w, j):
        return vlmkernels.relative_similarity((v, i), (w, j))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for q, k, c, m in ((5, 6, 4, 7), (9, 3, 20, 11)):
        inputs = *rep(q, k, 30), *rep(c, m, 30)
        torch.testing.assert_close(compiled(*inputs), step(*inputs))


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.once
def test_recorded(recorder):
    class Similarity(torch.nn.Module):
        def forward(self, v, i, w, j):
            return vlmkernels.relative_similarity((v, i), (w, j))

    images, texts = torch.export.Dim("images", min=2), torch.export.Dim("texts", min=2)
    dynamic = [{0: images}, {0: images}, {0: texts}, {0: texts}]
    module = recorded(recorder, Similarity(), (*rep(6, 5, 20), *rep(4, 7, 20)), dynamic)
    inputs = *rep(30, 5, 20), *rep(44, 7, 20)
    assert torch.equal(module(*inputs), Similarity()(*inputs))


def test_autocast_changes_nothing():
    image, text = rep(5, 9, 20), rep(7, 8, 20)
    with torch.autocast("cpu", torch.bfloat16):
        got = vlmkernels.relative_similarity(image, text)
    assert torch.equal(got, vlmkernels.relative_similarity(image, text))


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize(
    "indices",
    [[[0, 1, 2], [3, 5, 4]], [[0, 1, 1], [3, 4, 5]], [[0, 1, 2], [-1, 4, 5]], [[-(2**63), 1, 2], [3, 4, 5]]],
    ids=["falling", "twice", "negative", "most negative"],
)
def test_indices_must_ascend(side, indices):
    reps = {"image": rep(2, 3, 9), "text": rep(2, 3, 9)}
    reps[side] = (reps[side][0], torch.tensor(indices))
    with pytest.raises(
        ValueError, match=f"relative_similarity: {side}_indices must ascend in each row, from 0 on"
    ):
        vlmkernels.relative_similarity(reps["image"], reps["text"])


def test_errors_name_every_invalid_argument():
    v, i = rep(2, 3, 9)
    with pytest.raises(ValueError, match=r"^relative_similarity: ") as caught:
        vlmkernels.relative_similarity((v, i[:1]), (v.int(), i.int()))
    for part in (
        "image_rep must be values and indices [rows, k], indices of int64, got torch.float32 [2, 3] and",
        "text_rep must be", "text_rep torch.int32",
    ):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(
        TypeError, match=r"relative_similarity: image_rep must be \(dense Tensor, dense Tensor\), got Tensor"
    ):
        vlmkernels.relative_similarity(v, (v, i))
    for values in ((v, i[:1], v, i), (v, i, v[0], i[0]), (v, i.int(), v, i)):
        with pytest.raises(ValueError, match="relative_similarity: "):
            raw(*values)
