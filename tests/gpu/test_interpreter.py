"""The interpreter computes what the hardware computes, catches seeded faults and leaves no trace."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from .interpreter import Violation, interpreting, multiply_tf32x3, truncate_to_tf32  # noqa: E402


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
def _double(X, OUT, n, BLOCK: tl.constexpr, LOAD_SLACK: tl.constexpr, STORE_SLACK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at, mask=at < n + LOAD_SLACK) * 2, mask=at < n + STORE_SLACK)


@triton.jit
def _copy_rows(X, OUT, stride, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(OUT + row * n + at, tl.load(X + row * stride + at), mask=at < n)


@triton.jit
def _accumulate(X, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT, tl.load(OUT) + tl.sum(tl.load(X + at, mask=at < n, other=0.0), 0))


@triton.jit
def _accumulate_atomically(X, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(OUT, tl.sum(tl.load(X + at, mask=at < n, other=0.0), 0))


@triton.jit
def _shift(X, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + at, tl.load(X + at + 1, mask=at + 1 < n, other=0.0), mask=at < n)


@triton.jit
def _overlapping(X, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at, mask=at < n), mask=at < n)


@triton.jit
def _wide_load(X, OUT, offset):
    tl.store(OUT, tl.load((X + offset).to(tl.pointer_type(tl.int32))))


@triton.jit
def _far(X, OUT, row, stride):
    tl.store(OUT, tl.load(X + row * stride))


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


def test_everything_is_restored():
    from triton.runtime import interpreter as stock
    from triton.runtime.jit import JITFunction

    def state():
        builder = dict(vars(stock.InterpreterBuilder))
        lang = dict(vars(tl))
        tensor = dict(vars(tl.tensor))
        return builder, lang, tensor, set(globals()), JITFunction.run, JITFunction.__call__

    _run_matmul(torch.bfloat16)
    before = state()
    first = _compile_matmul()
    _run_matmul(torch.bfloat16, sanitize=True)
    with pytest.raises(ValueError, match="inside"), interpreting():
        raise ValueError("inside")
    assert state() == before
    assert _compile_matmul() == first
    x, y, out = _run_matmul(torch.bfloat16)
    assert torch.allclose(out, x.float() @ y.float(), atol=1e-4)
    with pytest.raises(RuntimeError, match="nest"), interpreting(), interpreting():
        pass


def _faulty(launch, message):
    with pytest.raises(Violation, match=message), interpreting(sanitize=True):
        launch()


def test_sanitizer_accepts_correct_kernels():
    x, strided = torch.randn(100), torch.randn(8, 40)[:, :24]
    with interpreting(sanitize=True):
        out, rows, total = torch.empty(100), torch.empty(8, 32), torch.zeros(1)
        _double[(4,)](x, out, 100, 32, 0, 0)
        _double[(4,)](out, out.new_empty(100), 100, 32, 0, 0)
        _copy_rows[(8,)](strided[:, :16], rows, 40, 16, 16)
        _accumulate_atomically[(4,)](x, total, 100, 32)
    assert torch.equal(out, 2 * x)
    assert torch.allclose(total, x.sum())


def test_sanitizer_catches_accesses_outside_the_arguments():
    x, out = torch.randn(100), torch.zeros(100)
    _faulty(lambda: _double[(4,)](x, out, 100, 32, 28, 0), "load out of bounds")
    _faulty(lambda: _double[(4,)](x, out, 100, 32, 0, 1), "store out of bounds")


def test_sanitizer_catches_accesses_outside_the_view():
    strided, out = torch.randn(8, 40)[:, :24], torch.zeros(8, 24)
    _faulty(lambda: _copy_rows[(8,)](strided, out, 40, 24, 32), "load outside the view")


def test_sanitizer_catches_uninitialised_reads():
    def launch():
        out = torch.empty(1)
        _accumulate[(1,)](torch.randn(32), out, 32, 32)

    _faulty(launch, "load of uninitialised memory")

    def half_written():
        buffer = torch.empty(64)
        _double[(1,)](torch.randn(32), buffer, 32, 32, 0, 0)
        _double[(2,)](buffer, torch.empty(64), 64, 32, 0, 0)

    _faulty(half_written, "load of uninitialised memory, 128 bytes, first at offset 128")
    with interpreting(sanitize=True):
        buffer = torch.empty(64).fill_(1.0)
        _double[(2,)](buffer, torch.empty(64), 64, 32, 0, 0)


def test_sanitizer_catches_races_between_programs():
    x = torch.randn(100)
    _faulty(
        lambda: _accumulate[(4,)](x, torch.zeros(1), 100, 32), "race: load of what another program stores"
    )
    _faulty(lambda: _overlapping[(4,)](x, torch.zeros(100), 100, 32), "race: two programs store")
    _faulty(lambda: _shift[(4,)](x.clone(), 100, 32), "race: store to what another program loads")


def test_sanitizer_catches_misalignment_and_overflow():
    x, out = torch.randn(8).bfloat16(), torch.zeros(1, dtype=torch.int32)
    with interpreting(sanitize=True):
        _wide_load[(1,)](x, out, 2)
    assert out.view(torch.bfloat16)[0] == x[2]
    _faulty(lambda: _wide_load[(1,)](x, out, 1), "misaligned load of 4 bytes")
    with pytest.raises(triton.runtime.errors.InterpreterError, match="overflow"), interpreting(sanitize=True):
        _far[(1,)](x, out, 70000, 70000)


def test_numpy_is_the_only_state_the_interpreter_shares():
    before = np.geterr()
    _run_matmul(torch.float32)
    assert np.geterr() == before
