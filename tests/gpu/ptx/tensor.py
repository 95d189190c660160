"""What the lanes of a warp do together: products of tensor cores, ldmatrix, shuffles, reductions.

Arrays hold all warps at once; lane l of a warp is thread g = l / 4 of a column and t = l % 4 of a row.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .alu import from_bf16, from_f16


def tf32_of(bits: np.ndarray) -> np.ndarray:
    """A tensor core reads ten bits of mantissa."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _halves(bits: np.ndarray, decode: Callable) -> np.ndarray:
    """Two 16-bit numbers of each register, the low one first: [..., 2]."""
    return decode(np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2))


def _accumulate(a: np.ndarray, b: np.ndarray, c: Sequence[np.ndarray], warps: int) -> list[np.ndarray]:
    """c + a b of a [warps, 16, K] and b [warps, K, 8]; the sum is exact and then rounded to float32."""
    # registers [row half, column parity] of lanes (g, t): rows g and g + 8, columns 2t and 2t + 1
    addend = np.stack(c).reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
    total = (np.matmul(a, b, dtype=np.float64) + addend).astype(np.float32)
    return list(total.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1))


def mma_16816(decode: Callable) -> Callable:
    """m16n8k16 of 16-bit numbers."""

    def product(a, b, c):
        warps = a[0].size // 32
        # column half, row half, warp, g, t, pair
        left = _halves(np.stack(a), decode).reshape(2, 2, warps, 8, 4, 2)
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16).astype(np.float64)
        right = _halves(np.stack(b), decode).reshape(2, warps, 8, 4, 2)  # row half, warp, g, t, pair
        right = right.transpose(1, 0, 3, 4, 2).reshape(warps, 16, 8).astype(np.float64)
        return _accumulate(left, right, c, warps)

    return product


def mma_1688(a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[np.ndarray]) -> list[np.ndarray]:
    """m16n8k8 of TF32."""
    warps = a[0].size // 32
    left = tf32_of(np.stack(a)).reshape(2, 2, warps, 8, 4)  # column half, row half, warp, g, t
    left = left.transpose(2, 1, 3, 0, 4).reshape(warps, 16, 8).astype(np.float64)
    right = tf32_of(np.stack(b)).reshape(2, warps, 8, 4)  # row half, warp, g, t
    right = right.transpose(1, 0, 3, 2).reshape(warps, 8, 8).astype(np.float64)
    return _accumulate(left, right, c, warps)


# Opcode -> the product of registers a, b, c, and its multiply-adds in a warp
MMA = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": (mma_16816(from_bf16), 16 * 8 * 16),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": (mma_16816(from_f16), 16 * 8 * 16),
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": (mma_1688, 16 * 8 * 8),
}

# Opcode -> matrices of a warp, and whether they are transposed
LDMATRIX = {
    f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16": (count, bool(trans))
    for count in (1, 2, 4)
    for trans in ("", ".trans")
}


def matrix_rows(addresses: np.ndarray, count: int) -> np.ndarray:
    """Addresses of the rows of `count` matrices: lane i of a warp holds that of row i."""
    return addresses.reshape(-1, 32)[:, : 8 * count].ravel()


def matrix_registers(rows: np.ndarray, warps: int, count: int, transposed: bool) -> list[np.ndarray]:
    """Registers of ldmatrix from its rows [4 words, warps * count * 8]."""
    numbers = np.ascontiguousarray(rows.T).view(np.uint16).reshape(warps, count, 8, 8)
    if transposed:
        numbers = numbers.swapaxes(2, 3)
    words = np.ascontiguousarray(numbers).view(np.uint32).reshape(warps, count, 32)
    return [words[:, i].ravel() for i in range(count)]


def shuffle_source(mode: str, lane: np.ndarray, b: np.ndarray, c: np.ndarray):
    """The lane that each lane of shfl reads, and whether it is within its segment."""
    step, clamp, segment = b.astype(np.int64) & 31, c.astype(np.int64) & 31, c.astype(np.int64) >> 8 & 31
    low = lane & segment
    high = low | (clamp & ~segment)
    if mode == "up":
        source = lane - step
        inside = source >= high
    else:
        source = {"down": lane + step, "bfly": lane ^ step, "idx": low | (step & ~segment)}[mode]
        inside = source <= high
    return np.where(inside, source, lane), inside


SHUFFLES = {f"shfl.sync.{mode}.b32": mode for mode in ("bfly", "down", "idx", "up")}
REDUCTIONS = {
    "redux.sync.min.s32": (np.minimum, np.iinfo(np.int32).max),
    "redux.sync.max.s32": (np.maximum, np.iinfo(np.int32).min),
    "redux.sync.add.s32": (np.add, 0),
}
