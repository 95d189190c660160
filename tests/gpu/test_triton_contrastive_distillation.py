"""contrastive_distillation on the CPU, under the sanitizer, against the reference in float64."""

import pytest
import torch

pytest.importorskip("triton")

import vlmkernels
from benchmarks.gpu import trace
from vlmkernels import reference
from vlmkernels.ops import _pairwise_small
from vlmkernels.testing import assert_as_good, assert_op_as_good, result_and_gradients, unit_features
from vlmkernels.triton import _contrastive_distillation_bwd as launcher_bwd
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton import contrastive_distillation as launcher

from .interpreter import interpreting
from .launches import recording
from .trials import DTYPES, check, sanitized
from .trials_pairwise import Distillation

pytestmark = pytest.mark.sampled(5)

SIZES = [(1, 1, 1, 1), (37, 130, 37, 5), (65, 63, 16, 96)]
ROWS = {"symmetric": False, "divergence": "cross_entropy"}


@pytest.fixture
def small_chunks(monkeypatch):
    """Rows of one tile at a time, whose columns are read by several programs."""
    monkeypatch.setattr(pairwise, "CHUNK_ROWS", 70)
    monkeypatch.setattr(launcher, "PARTIAL_BYTES", 0)
    monkeypatch.setattr(launcher, "PROGRAMS", 2)
    monkeypatch.setattr(launcher, "LINES", 32)
    monkeypatch.setattr(launcher_bwd, "READ", 8)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", [{}, {**ROWS, "reduction": "none"}, {"reduction": "sum"}], ids=str)
def test_block(size, dtype, options):
    scale = 1.0 if size[0] == 1 else 10.0  # the rounding of one large logit is luck
    work = torch.promote_types(dtype, torch.float32)
    check(Distillation(*size, dtype, scale=scale, teacher_scale=2 * scale, scale_dtype=work, **options))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, ROWS, {"reduction": "none"}], ids=str)
def test_chunks_of_rows_and_splits_of_columns(dtype, options):
    check(Distillation(150, 150, 2, 20, dtype, store_bytes=0, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_frozen_inputs_cost_and_return_nothing(needed, dtype, monkeypatch):
    trial = Distillation(37, 45, 24, 30, dtype, needs=tuple(i in needed for i in range(3)))
    check(trial)
    made = []
    monkeypatch.setattr(tiles, "product", lambda a, b, into, add=False: made.append(add))
    with recording() as launches:
        trial.launch()
    names = [launch.name.rpartition("._")[2] for launch in launches]
    assert made == [False] * sum(i in needed for i in (0, 1))
    assert names == ["stats", "losses", *(["tile_grads", "finish"] if needed else [])]
    assert not needed or (launches[2].tensors.get("OUT") is None) == (needed == (2,))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_call_and_its_backward_are_seven_launches(reduction, symmetric, dtype):
    """With torch's own: products of cuBLAS, and the sum of both directions where each row has a loss."""
    query, key = (torch.empty(4096, 512, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
    teacher = [torch.empty(4096, 768, dtype=dtype, device="meta") for _ in range(2)]
    scale, teacher_scale = torch.empty((), device="meta", requires_grad=True), torch.empty((), device="meta")
    dloss = torch.empty(4096 if reduction == "none" else (), device="meta")
    steps = trace.Pass()
    with trace.recording(steps, "sm_90"):
        loss = vlmkernels.contrastive_distillation(
            query, key, scale, *teacher, teacher_scale, symmetric=symmetric, reduction=reduction
        )
        torch.autograd.grad(loss, (query, key, scale), dloss)
    names = [step.name.rpartition(".")[2] for step in steps.steps]
    forward = ["_stats", "_losses", {"none": "aten::add"}.get(reduction, "aten::sum")]
    forward = forward[: 3 if symmetric or reduction != "none" else 2]
    assert names == [*forward, "_tile_grads", "cuBLAS", "cuBLAS", "_finish"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [100.0, 1000.0, -100.0, 1e-3, 0.0])
def test_extreme_logits(dtype, scale):
    check(Distillation(70, 66, 33, 20, dtype, scale=scale))
    check(Distillation(70, 66, 33, 20, dtype, teacher_scale=scale, **ROWS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whose", ["query", "teacher_query"])
def test_rows_and_columns_whose_logits_lie_hundreds_apart(dtype, whose):
    trial = Distillation(70, 66, 33, 20, dtype, scale=1.0, teacher_scale=1.0)
    key = whose.replace("query", "key")
    far = torch.linspace(0, 30, 70)[:, None].to(dtype), torch.linspace(30, 0, 66)[:, None].to(dtype)
    setattr(trial, whose, getattr(trial, whose) * far[0])
    setattr(trial, key, getattr(trial, key) * far[1])
    check(trial)


@pytest.mark.parametrize("near", [1e-2, 1e-4, 0.0])
@pytest.mark.parametrize("divergence", ["kl", "cross_entropy"])
def test_a_student_close_to_its_teacher(near, divergence):
    """The divergence and its gradients are differences of nearly equal numbers."""
    trial = Distillation(
        150, 170, 48, 48, torch.float32, near=near, scale=30.0, teacher_scale=30.0, divergence=divergence
    )
    loss, *grads = check(trial)
    if near == 0:
        assert all((grad == 0).all() for grad in grads)
        assert divergence == "cross_entropy" or abs(loss) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_and_permuted_features(dtype):
    trial = Distillation(40, 50, 20, 30, dtype)
    trial.query = trial.query[:1].expand(40, 20)
    trial.key = trial.key.T.contiguous().T
    trial.teacher_query = trial.teacher_query.repeat_interleave(2, 1)[:, ::2]
    trial.teacher_key = trial.teacher_key[:, :1].expand(50, 30)
    check(trial)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "size", [(0, 0, 4, 3), (0, 5, 4, 3), (6, 6, 0, 3), (6, 6, 4, 0), (6, 6, 0, 0)], ids=str
)
def test_sizes_of_zero(size, reduction, dtype):
    n, m, d, e = size
    symmetric = n == m or reduction == "mean"
    query, key, *teacher = (
        torch.randn(rows, width).to(dtype) for rows, width in ((n, d), (m, d), (n, e), (m, e))
    )
    tensors = [x.requires_grad_() for x in (query, key, torch.tensor(2.0))]

    def call(op):
        def loss(*student):
            return op(*student, *teacher, 3.0, reduction=reduction, symmetric=symmetric)

        return result_and_gradients(loss, tensors)

    with interpreting(sanitize=True), trace.OnTriton():
        got = call(vlmkernels.contrastive_distillation)
    for ours, theirs in zip(got, call(reference.contrastive_distillation), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float64")],
)
def test_a_teacher_of_another_dtype(student, teacher):
    query, key = unit_features(40, 50, 24, dtype=getattr(torch, student))
    teachers = unit_features(40, 50, 30, dtype=getattr(torch, teacher))
    with interpreting(sanitize=True), trace.OnTriton():
        got = vlmkernels.contrastive_distillation(query.requires_grad_(), key, 10.0, *teachers, 20.0)
        (dquery,) = torch.autograd.grad(got, query)
    assert got.dtype == torch.promote_types(torch.float32, teachers[0].dtype)
    assert dquery.dtype == query.dtype

    def theirs(work):
        leaf = query.detach().to(work).requires_grad_()
        loss = reference.contrastive_distillation(
            leaf, key.to(work), 10.0, *(x.to(work) for x in teachers), 20.0
        )
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    low, exact = theirs(torch.float32), theirs(torch.float64)
    assert_as_good(got, low[0].to(got.dtype) if got.dtype == torch.float32 else exact[0], exact[0])
    assert_as_good(dquery, low[1].to(dquery.dtype), exact[1])


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {**ROWS, "reduction": "none"}, {"divergence": "cross_entropy"}], ids=str
)
def test_the_public_op(shape, options, monkeypatch):
    """Registered for CUDA, with its gradients by autograd."""
    monkeypatch.setattr(_pairwise_small, "LIMIT", 0)  # a path of CPU tensors
    query, key = unit_features(70, 66, 24)
    teacher = [*unit_features(70, 66, 40), torch.full(shape, 20.0)]
    tensors = [x.requires_grad_() for x in (query, key, torch.full(shape, 10.0))]

    def ours(*student, **options):
        return vlmkernels.contrastive_distillation(*student, *teacher, **options)

    def theirs(*student, **options):
        return reference.contrastive_distillation(
            *student, *(x.to(student[0].dtype) for x in teacher), **options
        )

    with interpreting(sanitize=True), trace.OnTriton():
        assert_op_as_good(ours, theirs, tensors, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scaled_losses_as_a_grad_scaler_makes_them(dtype, reduction):
    """2^16 is no float16 number, and without it the gradients of float16 features are below its range."""
    trial = Distillation(200, 200, 24, 30, dtype, reduction=reduction)
    trial.dloss = trial.dloss.abs() * 2.0**16
    check(trial)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again(dtype):
    trial = Distillation(135, 140, 24, 30, dtype)
    assert all(map(torch.equal, check(trial), check(trial)))


@pytest.mark.parametrize("whose", ["key", "teacher_key"])
@pytest.mark.parametrize("at", [0, 65])
def test_nan_is_not_hidden(whose, at):
    trial = Distillation(70, 66, 24, 30, torch.float32)
    getattr(trial, whose)[at, 3] = float("nan")
    with sanitized():
        loss, dquery, dkey, dscale = trial.launch()
    assert loss.isnan()
    assert dquery.isnan().any()
    assert dkey.isnan().any()
    assert dscale.isnan()


@pytest.mark.parametrize("store_bytes", [0, 1 << 24])
def test_no_matrix_of_all_pairs(store_bytes, monkeypatch):
    """At N = M = 16384: sums of the columns, and 256 rows of gradients or what `store_bytes` hold."""
    monkeypatch.setattr(tiles, "product", lambda *_, **__: None)
    n, largest = 16384, 0
    trial = Distillation(2, 2, 8, 8, torch.bfloat16, store_bytes=store_bytes)
    for name in ("query", "key", "teacher_query", "teacher_key"):
        setattr(trial, name, getattr(trial, name)[:1].expand(n, 8).clone())
    with recording() as launches:
        trial.launch()
    for launch in launches:
        largest = max(largest, *(x.untyped_storage().nbytes() for x in launch.tensors.values()))
    assert largest <= max(launcher.PARTIAL_BYTES, 256 * n * 2, store_bytes) < 2 * n * n / 4
