"""Tiles of products of rows with rows: their kernel, the table of their sizes, their operands."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # row tiles whose programs run together, so that the keys they read stay in L2


@triton.jit
def similarities(
    Q,  # [n, depth]
    K,  # [m, depth]
    rows,  # [BLOCK_M]
    cols,  # [BLOCK_N]
    stride_q,
    stride_k,
    n,
    m,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<q_i, k_j> in float32, [BLOCK_M, BLOCK_N]; rows and columns past the end repeat the last one."""
    at = tl.arange(0, BLOCK_K)
    q = Q + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_q + at[None, :]
    k = K + tl.minimum(cols, m - 1).to(tl.int64)[None, :] * stride_k + at[:, None]
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(q), tl.load(k)
        else:
            a = tl.load(q, mask=(start + at < depth)[None, :], other=0.0)
            b = tl.load(k, mask=(start + at < depth)[:, None], other=0.0)
        out = tl.dot(a, b, out, input_precision=PRECISION)
        q += BLOCK_K
        k += BLOCK_K
    return out


@triton.jit
def grouped_tile(program, row_tiles, col_tiles, GROUP: tl.constexpr):
    """Row tile and column tile of a program."""
    in_group = GROUP * col_tiles
    first = program // in_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + program % in_group % height, program % in_group // height


class Tile(NamedTuple):
    """BLOCK_M x BLOCK_N similarities, accumulated in steps of BLOCK_K features."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self, depth: int, precision: str, fuse: bool) -> dict:
        """Keyword arguments of a launch for features of width `depth`; see `launch_options`."""
        block_k = self.block_k
        if depth < block_k:
            block_k = max(16, next_power_of_2(max(depth, 1)))
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": block_k,
            "EVEN_K": depth % block_k == 0,
            "PRECISION": precision,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": fuse,
        }


Tiles = dict[tuple[str, bool], Tile]
# (kind of product, whether large tiles fill the device); with their exceptions, by architecture, none spills
# inside a loop on sm_80, sm_90, sm_100, sm_120 or gfx942.
TILES: Tiles = {
    ("half", True): Tile(128, 64, 64, 4, 3),
    ("half", False): Tile(64, 64, 64, 4, 3),
    ("tf32", True): Tile(128, 64, 32, 4, 3),
    ("tf32", False): Tile(64, 64, 32, 4, 3),
    ("ieee", True): Tile(64, 64, 16, 8, 2),
    ("ieee", False): Tile(64, 64, 16, 8, 2),
}
TILES_ON: dict[str, Tiles] = {
    "gfx942": {  # 64 KiB of shared memory, where every stage counts in full; 64 lanes in a warp
        ("half", True): Tile(128, 64, 64, 4, 2),
        ("half", False): Tile(64, 64, 64, 4, 2),
        ("tf32", True): Tile(128, 64, 32, 4, 2),
        ("tf32", False): Tile(64, 64, 32, 4, 2),
        ("ieee", True): Tile(64, 64, 16, 4, 2),
        ("ieee", False): Tile(64, 64, 16, 4, 2),
    },
}
# Smaller tiles are limited by the bandwidth of L2 there. Kernels that sum over a tile lack the registers.
PRODUCTS_ON = TILES_ON | {on: {("half", True): Tile(128, 256, 64, 8, 3)} for on in ("sm_90", "sm_100")}
# Three sums for each row and column: four warps spill them, but where a warpgroup has the registers
STATISTICS: Tiles = TILES | {
    ("half", True): Tile(128, 64, 64, 8, 3),
    ("tf32", True): Tile(128, 64, 32, 8, 3),
}
STATISTICS_ON = TILES_ON | {
    "sm_90": {("half", True): TILES["half", True], ("tf32", True): TILES["tf32", True]}
}
LARGE = 256  # tiles


def cdiv(a: int, b: int) -> int:
    """As triton.cdiv, whose call takes a host microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """As triton.next_power_of_2, likewise."""
    return 1 << max(n - 1, 0).bit_length()


def tf32_allowed() -> bool:
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return setting == "tf32"


def architecture(x: Tensor) -> str:
    """The key of the tables' exceptions, such as "sm_90" or "gfx942"; "sm_80" without a GPU."""
    return _card(x.device)[0] if x.is_cuda else "sm_80"


def memory(x: Tensor) -> int:
    """Bytes of the card that has the tensor; 0 without a GPU."""
    return _card(x.device)[1] if x.is_cuda else 0


@functools.lru_cache
def _card(device: torch.device) -> tuple[str, int]:
    """Its architecture and memory, which take a host microseconds to look up."""
    card = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return card.gcnArchName.partition(":")[0], card.total_memory
    return f"sm_{card.major}{card.minor}", card.total_memory


def launch_options(
    query: Tensor,
    key: Tensor,
    *,
    fuse: bool,
    table: Tiles = TILES,
    exceptions: dict[str, Tiles] = TILES_ON,
    large: bool = True,
) -> dict:
    """The tile for a problem, from the table: a large one only if `large`.

    `fuse` lets the compiler turn a product and a sum into one instruction. Softmaxes must not use it: a logit
    has to be the same number when its maximum is computed and when the maximum is subtracted.
    """
    kind = kind_of_product(query)
    own = exceptions.get(architecture(query), {})
    tile = own.get((kind, True), table[kind, True])
    if not large or query.shape[0] * key.shape[0] < LARGE * tile.block_m * tile.block_n:
        tile = own.get((kind, False), table[kind, False])
    return tile.options(query.shape[1], "tf32" if kind == "tf32" else "ieee", fuse)


def kind_of_product(x: Tensor) -> str:
    """By which the tables choose: "half", "tf32" or "ieee"."""
    return "half" if x.dtype != torch.float32 else "tf32" if tf32_allowed() else "ieee"


def rows_contiguous(x: Tensor) -> Tensor:
    """Rows of consecutive elements with any stride between rows, as the kernels require."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def rows_of(x: Tensor, start: int, stop: int) -> Tensor:
    """The rows start <= i < stop: x itself if these are all."""
    return x if stop - start == len(x) else x[start:stop]


def operand(x: Tensor) -> Tensor:  # [n, d] -> [n, d up to a multiple of 16]
    """Rows as `similarities` reads them fastest: aligned and zero-padded to multiples of 16 elements.

    Unaligned elements are read one by one, which costs more than this copy and spills their addresses.
    """
    x = rows_contiguous(x)
    if x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    out = x.new_zeros((x.shape[0], cdiv(x.shape[1], 16) * 16))
    out[:, : x.shape[1]] = x
    return out


# Before, addmm takes no float32 sum for factors of 16 bits: pytorch/pytorch#167931
ADDS_IN_FLOAT32 = torch.__version__ >= (2, 11)  # type: ignore[operator]


def product(a: Tensor, b: Tensor, into: Tensor, *, add: bool = False) -> None:
    """into = a b, or into += a b, in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:  # other CPU tensors: the interpreter of the tests
        torch.addmm(into, a.float(), b.float(), beta=1 if add else 0, out=into)
    elif add and ADDS_IN_FLOAT32:
        torch.addmm(into, a, b, torch.float32, out=into)
    elif add:
        into += torch.mm(a, b, torch.float32)
    else:
        torch.mm(a, b, torch.float32, out=into)
