"""What the pairwise losses share for few rows: a program computes the tiles of all that it needs itself."""

import functools

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
    features: int,  # whose gradients are computed
    by_id: bool,
    *,
    fuse: bool,
) -> dict:
    """BLOCK_D features of a gradient are of one program; the others as of `_tiles.launch_options`."""
    kind, architecture = tiles.kind_of_product(query), tiles.architecture(query)
    return _options(kind, architecture, query.shape[1], features, by_id, fuse)


@functools.lru_cache
def _options(kind: str, architecture: str, width: int, features: int, by_id: bool, fuse: bool) -> dict:
    tile = tiles.TILES_ON.get(architecture, {}).get((kind, False), tiles.TILES[kind, False])
    options = tile.options(width, "tf32" if kind == "tf32" else "ieee", fuse)
    block_k, block_d, warps = TILES[kind]
    block_k = min(block_k, options["BLOCK_K"])
    return options | {
        "BLOCK_M": ROWS,
        "BLOCK_N": ROWS,
        "BLOCK_K": block_k,
        "EVEN_K": width % block_k == 0,
        "BLOCK_D": max(16, min(block_d, tiles.next_power_of_2(features))),
        "num_warps": 8 if by_id else warps,  # ids take more registers
    }
