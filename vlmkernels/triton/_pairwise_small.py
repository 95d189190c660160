"""What the pairwise losses share for few rows: a program computes the tiles of all that it needs itself."""

from torch import Tensor

from vlmkernels.triton import _tiles as tiles

LIMIT = 1024  # rows and columns
ROWS = 64  # of a tile, and its columns
TILES: dict[str, tuple[int, int, int]] = {  # by the kind of product: BLOCK_K, BLOCK_D, warps
    "half": (64, 128, 4),
    "tf32": (32, 64, 4),
    "ieee": (16, 64, 8),
}


def serves(n: int, m: int, normalize: bool) -> bool:
    """Normalised features are left out: the gradient of each depends on all those of its row."""
    return max(n, m) <= LIMIT and not normalize


def launch_options(
    query: Tensor,  # [N, D], an operand
    key: Tensor,  # [M, D]
    features: int,  # whose gradients are computed
    by_id: bool,
    *,
    fuse: bool,
) -> dict:
    """BLOCK_D features of a gradient are of one program; the others as of `_tiles.launch_options`."""
    options = tiles.launch_options(query, key, fuse=fuse)
    kind = options["PRECISION"] if query.element_size() == 4 else "half"
    block_k, block_d, warps = TILES[kind]
    block_k = min(block_k, options["BLOCK_K"])
    return options | {
        "BLOCK_M": ROWS,
        "BLOCK_N": ROWS,
        "BLOCK_K": block_k,
        "EVEN_K": query.shape[1] % block_k == 0,
        "BLOCK_D": max(16, min(block_d, tiles.next_power_of_2(features))),
        "num_warps": 8 if by_id else warps,  # ids take more registers
    }
