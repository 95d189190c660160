"""The sanitizer accepts correct kernels and names the fault of every seeded one."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from .interpreter import interpreting  # noqa: E402
from .sanitizer import Violation  # noqa: E402
from .trials import far  # noqa: E402


@triton.jit
def _double(X, OUT, n, BLOCK: tl.constexpr, LOAD_SLACK: tl.constexpr, STORE_SLACK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at, mask=at < n + LOAD_SLACK) * 2, mask=at < n + STORE_SLACK)


@triton.jit
def _copy_rows(X, OUT, stride, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(OUT + row * n + at, tl.load(X + row * stride + at), mask=at < n)


@triton.jit
def _copy_rows_far(X, OUT, stride, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(OUT + row * n + at, tl.load(X + row.to(tl.int64) * stride + at), mask=at < n)


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
def _reverse_twice(X, OUT, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + BLOCK - 1 - at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(OUT + at, tl.load(OUT + BLOCK - 1 - at))


@triton.jit
def _wide_load(X, OUT, offset):
    tl.store(OUT, tl.load((X + offset).to(tl.pointer_type(tl.int32))))


@triton.jit
def _far(X, OUT, row, stride):
    tl.store(OUT, tl.load(X + row * stride))


@triton.jit
def _scatter(X, INDEX, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + tl.load(INDEX + at), tl.load(X + at))


@triton.jit
def _positive(X, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.device_assert(x > 0, "x must be positive")
    tl.store(OUT + at, x)


@triton.jit
def _first_row_of_either(X, Y, OUT, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    base = tl.trans(tl.reshape(tl.broadcast_to((X + at)[:, None], (BLOCK, 1)), (1, BLOCK)))
    tl.store(OUT + at, tl.load(tl.reshape(base, (BLOCK,)) + n) + tl.load(Y))


def faulty(launch, message):
    with pytest.raises(Violation, match=message), interpreting(sanitize=True):
        launch()


def test_correct_kernels_pass():
    x, strided = torch.randn(100), torch.randn(8, 40)[:, :24]
    with interpreting(sanitize=True):
        out, rows, total = torch.empty(100), torch.empty(8, 32), torch.zeros(1)
        _double[(4,)](x, out, 100, 32, 0, 0)
        _double[(4,)](out, out.new_empty(100), 100, 32, 0, 0)
        _copy_rows[(8,)](strided[:, :16], rows, 40, 16, 16)
        _accumulate_atomically[(4,)](x, total, 100, 32)
        _scatter[(1,)](x, torch.randperm(64), out, 64)
        _positive[(1,)](x[:32].exp(), out, 32)
    assert torch.allclose(total, x.sum())


def test_accesses_outside_a_tensor_name_the_argument():
    x, out = torch.randn(100), torch.zeros(100)
    load, store = "load outside the view of X: 28 lanes", "store outside the view of OUT: 1 lanes"
    faulty(lambda: _double[(4,)](x, out, 100, 32, 28, 0), rf"{load}, first at byte 400 \(program 3\)")
    faulty(lambda: _double[(4,)](x, out, 100, 32, 0, 1), rf"{store}, first at byte 400 \(program 3\)")
    faulty(lambda: _double[(4,)](x, out[:0], 100, 32, 0, 0), "store outside the view of OUT: 32 lanes")


def test_padding_is_outside():
    strided, out = torch.randn(8, 40)[:, :24], torch.zeros(8, 24)
    faulty(lambda: _copy_rows[(8,)](strided, out, 40, 24, 32), "load outside the view of X: 8 lanes")


def test_a_neighbour_in_the_same_storage_is_outside():
    both = torch.zeros(2, 32)
    faulty(lambda: _double[(2,)](both[0], both[1], 64, 32, 0, 0), "load outside the view of X")
    faulty(lambda: _copy_rows[(1,)](both[1], both[0], 0, 48, 64), "load outside the view of X")
    with interpreting(sanitize=True):
        _double[(1,)](both[0], both[1], 32, 32, 0, 0)
        _double[(1,)](both[0], both[0], 32, 32, 0, 0)  # one address, two names


def test_pointers_keep_their_argument_when_they_change_shape():
    x, y, out = torch.randn(40), torch.randn(1), torch.empty(32)
    with interpreting(sanitize=True):
        _first_row_of_either[(1,)](x, y, out, 8, 32)
    assert torch.equal(out, x[8:] + y)
    faulty(lambda: _first_row_of_either[(1,)](x, y, out, 9, 32), "load outside the view of X: 1 lanes")


def test_uninitialised_reads():
    def never_written():
        _accumulate[(1,)](torch.randn(32), torch.empty(1), 32, 32)

    def half_written_by_a_kernel():
        buffer = torch.empty(64)
        _double[(1,)](torch.randn(32), buffer, 32, 32, 0, 0)
        _double[(2,)](buffer, torch.empty(64), 64, 32, 0, 0)

    def half_written_by_torch():
        buffer = torch.empty(64)
        buffer[:30].zero_()
        _double[(2,)](buffer, torch.empty(64), 64, 32, 0, 0)

    faulty(never_written, "load of uninitialised memory of OUT")
    faulty(half_written_by_a_kernel, "uninitialised memory of X: 32 lanes, first at byte 128")
    faulty(half_written_by_torch, "uninitialised memory of X: 2 lanes, first at byte 120")
    with interpreting(sanitize=True):
        buffer = torch.empty(64).fill_(1.0)
        _double[(2,)](buffer, torch.empty(64), 64, 32, 0, 0)
        torch.add(buffer, 1.0, out=buffer.new_empty(64))


def test_races():
    x = torch.randn(100)
    faulty(
        lambda: _accumulate[(4,)](x, torch.zeros(1), 100, 32), "load of what another program stores to OUT"
    )
    faulty(lambda: _overlapping[(4,)](x, torch.zeros(100), 100, 32), "race: two programs store to OUT")
    faulty(lambda: _shift[(4,)](x.clone(), 100, 32), "store to what another program loads from X")
    same = torch.zeros(32, dtype=torch.int64)
    faulty(lambda: _scatter[(1,)](x, same, torch.zeros(32), 32), "two lanes of one store .* of OUT: 31 lanes")


def test_a_program_reads_what_its_threads_stored_after_a_barrier():
    x, out = torch.randn(64), torch.empty(64)
    with interpreting(sanitize=True):
        _reverse_twice[(1,)](x, out, True, 64)
    assert torch.equal(out, x)
    faulty(lambda: _reverse_twice[(1,)](x, out, False, 64), "load without a barrier .* to OUT: 64 lanes")


def test_misaligned_accesses():
    x, out = torch.randn(8).bfloat16(), torch.zeros(1, dtype=torch.int32)
    with interpreting(sanitize=True):
        _wide_load[(1,)](x, out, 2)
    assert out.view(torch.bfloat16)[0] == x[2]
    faulty(lambda: _wide_load[(1,)](x, out, 1), "misaligned load of 4 bytes of X")


def test_overflow_of_offsets_and_assertions_of_the_kernel():
    faulty(lambda: _far[(1,)](torch.zeros(8), torch.zeros(1), 70000, 70000), "int32 overflow")
    faulty(lambda: _positive[(1,)](torch.zeros(8), torch.zeros(8), 8), "x must be positive")


def test_huge_strides_cost_no_memory():
    x = far(torch.randn(3, 8))
    stride = x.stride(0)
    out = torch.empty(3, 8)
    with interpreting(sanitize=True):
        _copy_rows_far[(3,)](x, out, stride, 8, 8)
    assert torch.equal(out, x)
    faulty(lambda: _copy_rows_far[(3,)](x[:2], out, stride, 8, 8), "load outside the view of X: 8 lanes")
    faulty(lambda: _copy_rows[(3,)](x, out, stride, 8, 8), "int32 overflow")


def test_a_fault_leaves_the_sanitizer_ready():
    x, out = torch.randn(100), torch.zeros(100)
    with interpreting(sanitize=True):
        with pytest.raises(Violation):
            _double[(4,)](x, out, 100, 32, 0, 1)
        _double[(4,)](x, out, 100, 32, 0, 0)
    assert torch.equal(out, 2 * x)
