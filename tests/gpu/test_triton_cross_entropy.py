"""linear_cross_entropy on the CPU, under the sanitizer, against the reference in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("triton")

from vlmkernels import reference
from vlmkernels.ops import _linear_cross_entropy_sweep as sweep
from vlmkernels.testing import assert_as_good
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_classes as layer
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton import linear_cross_entropy as launcher

from .interpreter import interpreting
from .launches import recording
from .trials import DTYPES, check, grid, sanitized
from .trials_pairwise import CrossEntropy

pytestmark = pytest.mark.sampled(5)

EVERY = {"bias": True, "column_scale": True, "smoothing": 0.2}
ALL = (True, True, True)


@pytest.fixture
def seven_rows(monkeypatch):
    """Chunks of seven rows, whose classes are read 64 at once."""
    monkeypatch.setattr(pairwise, "CHUNK_ROWS", 7)
    monkeypatch.setattr(layer, "CHUNK_BYTES", 0)
    monkeypatch.setattr(launcher, "READ", 64)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", [(1, 1, 1), (12, 37, 130), (7, 2100, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"column_scale": True}, EVERY], ids=str)
def test_block(size, dtype, options):
    check(CrossEntropy(*size, dtype, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_frozen_operands_cost_and_return_nothing(needed, dtype):
    check(CrossEntropy(9, 40, 12, dtype, **EVERY, needs=tuple(i in needed for i in range(3))))


@pytest.mark.usefixtures("seven_rows")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ignored", "spread"), [(0.0, 0.01), (0.5, 100.0), (0.9, 1.0), (1.0, 1.0)])
def test_chunks(dtype, ignored, spread):
    check(CrossEntropy(30, 150, 12, dtype, **EVERY, ignored=ignored, spread=spread))


@pytest.mark.usefixtures("seven_rows")
@pytest.mark.parametrize(("dtype", "left"), grid(DTYPES, [(0, 1), (1, 1), (7, 1), (8, 2), (30, 5)]))
def test_chunks_in_which_no_row_counts_are_left_out(dtype, left, monkeypatch):
    """To the same bits as with them, which is what a captured graph does."""
    rows, chunks = left
    trial = CrossEntropy(30, 150, 12, dtype, **EVERY, ignored=0.0)
    trial.target[torch.randperm(30)[rows:]] = -1
    with recording() as launches:
        trial.launch()
    assert sum("_row_losses" in launch.name for launch in launches) == chunks
    few = check(trial)
    monkeypatch.setattr(layer, "_count", lambda counted: lambda: len(counted))
    with recording() as launches:
        trial.launch()
    assert sum("_row_losses" in launch.name for launch in launches) == 5
    for a, b in zip(few, check(trial), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("needed", "products", "moves"), [((), 1, 1), ((0,), 2, 2), ((1,), 2, 1), ((2,), 2, 1), ((0, 1, 2), 4, 2)]
)
def test_launches_of_a_chunk(needed, products, moves, monkeypatch):
    made = []
    monkeypatch.setattr(tiles, "product", lambda a, b, into, add=False: made.append(add))
    with recording() as launches:
        CrossEntropy(9, 40, 12, torch.bfloat16, needs=tuple(i in needed for i in range(3))).launch()
    names = [launch.name.rpartition("._")[2] for launch in launches]
    assert (len(made), names.count("move_rows"), names.count("row_losses")) == (products, moves, 1)
    assert not any(made)


@pytest.mark.parametrize("adds", [True, False])
def test_products_of_16_bits_add_up_in_float32(adds, monkeypatch):
    """By overloads that torch has on CUDA alone; before 2.11 that of addmm takes no float32 sum."""

    def mm(a, b, dtype, out=None):
        result = a.to(dtype) @ b.to(dtype)
        return result if out is None else out.copy_(result)

    def addmm(into, a, b, dtype, out):
        assert adds
        return out.copy_(into + mm(a, b, dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(tiles, "ADDS_IN_FLOAT32", adds)
    a, b, into = torch.randn(3, 4).half(), torch.randn(4, 5).half(), torch.full((3, 5), torch.nan)
    tiles.product(a, b, into)
    tiles.product(a, b, into, add=True)
    assert torch.equal(into, 2 * (a.float() @ b.float()))


def test_the_host_asks_for_the_rows_while_the_first_chunk_is_at_work():
    asked = []
    chunks = layer._chunks(20, 8, lambda: asked.append(True) or 9)
    assert next(chunks) == (0, 8)
    assert not asked
    assert list(chunks) == [(8, 16)]
    assert asked == [True]
    asked.clear()
    assert list(layer._chunks(8, 8, lambda: asked.append(True) or 8)) == [(0, 8)]
    assert list(layer._chunks(0, 1, lambda: asked.append(True) or 0)) == []
    assert not asked


def test_nothing_is_asked_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert layer._count(torch.empty(5, dtype=torch.bool, device="meta"))() == 5
    assert layer._count(torch.tensor([True, False, True]))() == 2


def test_logits_are_chunks_in_memory():
    """No tensor is larger than a chunk of logits or an operand, and the gradients lie in the chunk."""
    trial = CrossEntropy(1000, 150_000, 2, torch.bfloat16)
    with recording() as launches:
        trial.launch()
    (*_, last) = [launch.tensors for launch in launches if "_row_losses" in launch.name]
    assert last["Z"].untyped_storage().nbytes() == 256 * 150_000 * 4 <= layer.CHUNK_BYTES
    assert last["DZ"].untyped_storage().data_ptr() == last["Z"].untyped_storage().data_ptr()


@pytest.fixture
def triton_sweep(monkeypatch):
    """The op composed of the Triton launcher."""
    monkeypatch.setattr(sweep, "_parts", launcher.linear_cross_entropy_sweep)


def truth(work, hidden, weight, bias, dloss, **options):
    leaves = [x.detach().to(work).requires_grad_() for x in (hidden, weight, bias)]
    loss = reference.linear_cross_entropy(leaves[0], leaves[1], bias=leaves[2], **options)
    grads = torch.autograd.grad(loss, leaves, dloss.to(loss.dtype).expand(loss.shape))
    return loss.detach(), *(grads if work == torch.float64 else (x.to(hidden.dtype) for x in grads))


@pytest.mark.usefixtures("triton_sweep")
@pytest.mark.parametrize(
    ("of", "reduction", "ignored"),
    grid(
        [(torch.float32, True), *((t, False) for t in (*DTYPES, torch.float64))],
        ["mean", "sum", "none"],
        [0.0, 0.4, 1.0],
    ),
)
def test_linear_cross_entropy(of, reduction, ignored, monkeypatch):
    """Rows are dropped on the host, or by the kernel where the host does not know them."""
    dtype, knows = of
    monkeypatch.setattr(sweep, "_host_knows", lambda x: knows)
    hidden, weight, bias = (torch.randn(size).to(dtype) for size in ((20, 24), (70, 24), (70,)))
    target, column_scale = torch.randint(0, 70, (20,)), torch.rand(70)
    target[torch.rand(20) < ignored] = -7
    hidden[target == -7] = float("nan")
    dloss = torch.randn(20 if reduction == "none" else ())
    options = {"ignore_index": -7, "label_smoothing": 0.1, "reduction": reduction}
    arguments = (hidden, weight, target, bias, column_scale, *options.values())
    options |= {"target": target, "column_scale": column_scale}
    with interpreting(sanitize=True):
        loss, *ahead = sweep.forward(*arguments, *ALL)
        grads = sweep.backward(dloss, *arguments, ALL)
    low = truth(torch.promote_types(dtype, torch.float32), hidden, weight, bias, dloss, **options)
    exact = truth(torch.float64, hidden, weight, bias, dloss, **options)
    assert_as_good(loss, low[0], exact[0])
    for got, lower, true in zip(grads, low[1:], exact[1:], strict=True):
        if dtype.itemsize > 2:
            assert_as_good(got, lower, true)
        else:
            assert (got.double() - true).norm() <= 5e-3 * true.norm()
    if reduction != "none":
        for got, later in zip(ahead, grads, strict=True):
            tolerance = 2e-2 if dtype.itemsize == 2 else 1e-5
            assert (got * dloss - later).norm() <= tolerance * later.norm()


@pytest.mark.usefixtures("triton_sweep")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "v", "d"), [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("knows", [True, False])
def test_sizes_of_zero(n, v, d, dtype, knows, monkeypatch):
    monkeypatch.setattr(sweep, "_host_knows", lambda x: knows)
    hidden, weight, bias = (torch.randn(size, dtype=dtype) for size in ((n, d), (v, d), (v,)))
    target = torch.arange(n) if v else torch.full((n,), -100)
    options = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}
    with interpreting(sanitize=True):
        got = sweep.forward(hidden, weight, target, bias, None, *options.values(), *ALL)
    want = truth(dtype, hidden, weight, bias, torch.ones(()), target=target, **options)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("seven_rows")
@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_that_cannot_be(dtype):
    """Their logits are -inf, of a whole read as well: no gradient; as a target, an infinite loss."""
    trial = CrossEntropy(9, 150, 12, dtype, bias=True, ignored=0.0)
    trial.bias[:100] = -torch.inf
    trial.target = torch.arange(9) + 100
    loss, dhidden, dweight, dbias = check(trial)
    assert loss.isfinite().all()
    assert (dweight[:100] == 0).all()
    assert (dbias[:100] == 0).all()
    trial.target[2] = 5
    with sanitized():
        loss, dhidden, *_ = trial.launch()
    want = cross_entropy(trial.hidden.double() @ trial.weight.double().T + trial.bias.double(), trial.target,
                         reduction="none")  # fmt: skip
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    assert loss[2] == torch.inf
    assert dhidden.isfinite().all()


@pytest.mark.usefixtures("seven_rows")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 70, 149])
def test_nan_is_not_hidden(dtype, at):
    trial = CrossEntropy(9, 150, 12, dtype, ignored=0.3)
    trial.target[0] = -1
    trial.weight[at, 3] = float("nan")
    with sanitized():
        loss, dhidden, *_ = trial.launch()
    counted = trial.target >= 0
    assert loss[counted].isnan().all()
    assert dhidden[counted].isnan().any()
    assert (loss[~counted] == 0).all()
    assert (dhidden[~counted] == 0).all()
