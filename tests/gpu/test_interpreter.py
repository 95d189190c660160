"""The interpreter computes what the hardware computes, catches seeded faults and leaves no trace."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import interpreter as stock  # noqa: E402

from . import interpreter  # noqa: E402
from .interpreter import interpreting, multiply_tf32x3, truncate_to_tf32  # noqa: E402
from .launches import recording  # noqa: E402
from .ptx import simulated  # noqa: E402


@triton.jit
def _matmul(X, Y, OUT, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(X + at[:, None] * SIZE + at)
    y = tl.load(Y + at[:, None] * SIZE + at)
    tl.store(OUT + at[:, None] * SIZE + at, tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def _arithmetic(X, Y, SUM, PRODUCT, RATIO, LARGER, TOTAL, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(SUM + at, x + y)
    tl.store(PRODUCT + at, x * y)
    tl.store(RATIO + at, (x / y).to(x.dtype))
    tl.store(LARGER + at, tl.where(x > y, x, y))
    tl.store(TOTAL, tl.sum(x.to(tl.float32), 0))


@triton.jit
def _cast(X, OUT, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(OUT + at, tl.load(X + at).to(OUT.dtype.element_ty))


@triton.jit
def _reduce(X, SUM, LARGEST, RUNNING, SIZE: tl.constexpr):
    x = tl.load(X + tl.arange(0, SIZE))
    tl.store(SUM, tl.sum(x, 0))
    tl.store(LARGEST, tl.max(x, 0))
    tl.store(RUNNING + tl.arange(0, SIZE), tl.cumsum(x, 0))


@triton.jit
def _fails(OUT, DIVISOR: tl.constexpr):
    tl.store(OUT, 1.0 / DIVISOR)


def _compile_matmul():
    signature = {"X": "*bf16", "Y": "*bf16", "OUT": "*fp32", "SIZE": "constexpr", "PRECISION": "constexpr"}
    source = ASTSource(_matmul, signature=signature, constexprs={(3,): 32, (4,): "ieee"})
    return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]


def _run_matmul(dtype, precision="ieee", size=64, **options):
    x, y = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size)
    with interpreting(**options):
        _matmul[(1,)](x, y, out, size, precision)
    return x, y, out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_sums_in_float32(dtype):
    x, y, out = _run_matmul(dtype)
    exact = x.double() @ y.double()
    assert (out - exact).abs().max() <= 2 * (x.float() @ y.float() - exact).abs().max() + 1e-6


def test_tf32_drops_bits_of_float32_products_that_allow_it():
    x, y, out = _run_matmul(torch.float32, "tf32")
    dropped = [torch.from_numpy(truncate_to_tf32(v.numpy())).double() for v in (x, y)]
    assert (out - dropped[0] @ dropped[1]).abs().max() < 1e-5 < (out - x.double() @ y.double()).abs().max()
    x, y, out = _run_matmul(torch.float32, "tf32", tf32=False)
    assert (out - x.double() @ y.double()).abs().max() < 1e-5


def test_three_tf32_products_are_nearly_those_of_float32():
    x, y, out = _run_matmul(torch.float32, "tf32x3")
    exact = x.double() @ y.double()
    assert 1e-8 < (out - exact).norm() / exact.norm() < 5e-7
    factor = torch.eye(16)
    factor[0, 0] = float("inf")
    with np.errstate(invalid="ignore"):
        product = torch.from_numpy(multiply_tf32x3(factor.numpy(), torch.ones(16, 16).numpy()))
    assert torch.equal(product[0], torch.full((16,), float("inf")))
    assert torch.equal(product[1:], torch.ones(15, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_that_of_torch_bit_for_bit(dtype):
    x, y = torch.randn(256).to(dtype), torch.randn(256).to(dtype)
    outs = [torch.empty(256, dtype=dtype) for _ in range(4)]
    total = torch.empty(1)
    with interpreting(sanitize=True):
        _arithmetic[(1,)](x, y, *outs, total, 256)
    for got, want in zip(outs, (x + y, x * y, x / y, torch.maximum(x, y)), strict=True):
        assert torch.equal(got, want)
    assert torch.allclose(total, x.float().sum())


@triton.jit
def _extremes(X, Y, LOW, HIGH, n: tl.constexpr):
    at = tl.arange(0, n)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(LOW + at, tl.minimum(x, y))
    tl.store(HIGH + at, tl.maximum(x, y))


@pytest.mark.parametrize(
    ("executor", "dtype"),
    [
        (simulated, torch.float32),
        *((interpreting, t) for t in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_an_extreme_of_a_number_and_nan_is_the_number(executor, dtype):
    values = torch.tensor([1.0, -2.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    x, y = (side.reshape(-1)[-16:] for side in torch.meshgrid(values, values.flip(0), indexing="ij"))
    low, high = torch.empty_like(x), torch.empty_like(x)
    with executor():
        _extremes[(1,)](x.contiguous(), y.contiguous(), low, high, 16)
    assert torch.equal(low.nan_to_num(7), torch.fmin(x, y).nan_to_num(7))
    assert torch.equal(high.nan_to_num(7), torch.fmax(x, y).nan_to_num(7))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
def test_casts_round_as_torch_does(source, target):
    x = torch.cat(
        [torch.randn(1000) * 10, torch.tensor([0.0, -0.0, 1e-40, 65504.0, 3.3e38] * 4), torch.zeros(4)]
    )
    x = x.nan_to_num(posinf=1.0).clamp(-6e4, 6e4).to(source) if source != torch.float32 else x
    x = x[:1024]
    if source.is_floating_point:
        x[-3:] = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(source)
    out = torch.empty(1024, dtype=target)
    with interpreting():
        _cast[(1,)](x, out, 1024)
    assert torch.equal(out.nan_to_num(), x.to(target).nan_to_num())
    assert torch.equal(out.isnan(), x.to(target).isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reductions_and_scans(dtype):
    x = torch.randint(-4, 5, (64,)).to(dtype)  # sums are exact
    out = [torch.empty(size, dtype=dtype) for size in (1, 1, 64)]
    with interpreting():
        _reduce[(1,)](x, *out, 64)
    for got, want in zip(out, (x.sum(), x.max(), x.cumsum(0)), strict=True):
        assert torch.equal(got.squeeze(), want)


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("target", FP8)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_to_8_bits_round_to_nearest_even_and_saturate(source, target):
    every = torch.arange(256, dtype=torch.uint8).view(target).float()
    every = every[every.isfinite()].sort().values.unique()
    middles = (every[1:] + every[:-1]) / 2
    x = torch.cat([every, middles, torch.randn(2048 - 2 * len(every) + 1 - 4) * 30])
    largest = torch.finfo(target).max
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), float("nan"), 2.0**15])]).to(source)
    out = torch.empty(2048, dtype=target)
    with interpreting():
        _cast[(1,)](x, out, 2048)
    distance = (x.float()[:, None].clamp(-largest, largest) - every).abs()
    nearest = distance.amin(1, keepdim=True)
    got = out.float()
    assert torch.equal(got.isnan(), x.isnan())
    kept = ~x.isnan()
    assert torch.equal((got - x.float().clamp(-largest, largest)).abs()[kept], nearest[:, 0][kept])
    tied = kept & ((distance == nearest).sum(1) == 2)
    assert tied.sum() > 100
    assert (out.view(torch.uint8)[tied] % 2 == 0).all()


@pytest.mark.parametrize("dtype", FP8)
def test_8_bits_widen_exactly_and_multiply_in_float32(dtype):
    x = torch.arange(256, dtype=torch.uint8).view(dtype)
    for target in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.empty(256, dtype=target)
        with interpreting():
            _cast[(1,)](x, out, 256)
        assert torch.equal(out.nan_to_num(), x.to(target).nan_to_num())
    x, y, out = _run_matmul(dtype)
    exact = x.double() @ y.double()
    assert (out - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_everything_is_restored():
    from triton.runtime import interpreter as stock
    from triton.runtime.jit import JITFunction

    def state():
        builder = dict(vars(stock.InterpreterBuilder))
        lang = dict(vars(tl))
        core, tensor = dict(vars(tl.core)), dict(vars(tl.tensor))
        reductions = stock.ReduceScanOpInterface.apply
        options, patch = stock.interpreter_builder.options, stock._patch_lang_tensor
        launch = JITFunction.run, JITFunction.__call__
        return builder, lang, core, tensor, reductions, options, patch, set(globals()), launch

    before = state()
    assert not set(globals()) - NAMES
    assert not stock.interpreter_builder.options.debug
    first = _compile_matmul()
    _run_matmul(torch.bfloat16, sanitize=True)
    with pytest.raises(ValueError, match="inside"), interpreting():
        raise ValueError("inside")
    assert state() == before
    assert _compile_matmul() == first
    x, y, out = _run_matmul(torch.bfloat16)
    assert torch.allclose(out, x.float() @ y.float(), atol=1e-4)
    out = torch.empty(1)
    with pytest.raises(ZeroDivisionError), interpreting(sanitize=True):
        _fails[(1,)](out, 0)
    assert state() == before
    assert _compile_matmul() == first


@pytest.mark.parametrize("other", [interpreting, recording])
def test_contexts_that_take_launches_do_not_nest(other):
    for outer, inner in ((interpreting, other), (other, interpreting)):
        with pytest.raises(RuntimeError, match=r"nest|already"), outer(), inner():
            pass
    x, y, out = _run_matmul(torch.bfloat16)
    assert torch.allclose(out, x.float() @ y.float(), atol=1e-4)


def test_numpy_is_the_only_state_the_interpreter_shares():
    before = np.geterr()
    _run_matmul(torch.float32)
    assert np.geterr() == before


NAMES = {*globals(), "NAMES"}  # of this module before the first launch


def test_names_that_triton_gets_meanwhile_leave_earlier_kernels_alone(monkeypatch):
    """A warning gives Triton's module a registry between the first launches of two kernels."""
    monkeypatch.setattr(stock.InterpretedFunction, "rewritten_fn", {})
    monkeypatch.setattr(interpreter, "_borrowed", {})
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def cast() -> torch.Tensor:
        out = torch.empty(4)
        with interpreting():
            _cast[(1,)](x, out, SIZE=4)
        return out

    assert torch.equal(cast(), x)
    monkeypatch.setattr(stock, "came_later", True, raising=False)
    with interpreting():
        _reduce[(1,)](x, torch.empty(1), torch.empty(1), torch.empty(4), SIZE=4)
    assert torch.equal(cast(), x)
    assert not {"came_later", "interpreter_semantic"} & set(globals())


NAMES = {*globals(), "NAMES"}  # of this module before the first launch
