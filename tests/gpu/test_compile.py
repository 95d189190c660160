"""Every kernel compiles without a GPU for sm_80 and sm_90, reads wide words and spills inside no loop."""

import re

import pytest
import torch

pytest.importorskip("triton")

from vlmkernels.triton import _contrastive as tiles
from vlmkernels.triton import gated_linear_residual, gated_residual, info_nce, sigmoid_loss

from .compiling import sass, spills_in_loops

ROW_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def contrastive_cases():
    for (kind, large), tile in tiles.TILES.items():
        if (kind, large) == ("ieee", False):  # the same tile
            continue
        for arch in (80, 90):
            for kernel in ("stats", "grads", "sigmoid"):
                first = (kind, large, arch) == ("half", True, 90)
                yield pytest.param(
                    kernel, kind, tile, arch, id=f"{kernel}-{kind}-{tile.block_m}x{tile.block_n}-sm{arch}",
                    marks=() if first else pytest.mark.slow,
                )  # fmt: skip


@pytest.mark.parametrize(("kernel", "kind", "tile", "arch"), list(contrastive_cases()))
def test_contrastive_kernels(kernel, kind, tile, arch, tmp_path):
    fn, constants = {
        "stats": (info_nce._stats, {}),
        "grads": (info_nce._tile_grads, {"GROUP": tiles.GROUP}),
        "sigmoid": (
            sigmoid_loss._sweep,
            {"GROUP": tiles.GROUP, "GAIN": None, "QUERY_IDS": None, "KEY_IDS": None},
        ),
    }[kernel]
    options = tile.options(512, "tf32" if kind == "tf32" else "ieee", kernel == "sigmoid")
    code = sass(fn, "bf16" if kind == "half" else "fp32", options, constants, arch, tmp_path)
    assert spills_in_loops(code) == 0
    assert re.search(r"LDGSTS\.E\.BYPASS(\.\w+)*\.128", code)  # 16 bytes a thread on the way to shared memory
    if kind != "ieee":
        assert "HGMMA" in code if arch == 90 else "HMMA" in code
    if kernel != "stats":
        assert "STG.E.128" in code


@pytest.mark.slow
def test_spills_inside_a_loop_are_seen(tmp_path):
    options = tiles.Tile(128, 128, 64, 4, 3).options(512, "ieee", False)
    assert spills_in_loops(sass(info_nce._stats, "bf16", options, {}, 80, tmp_path)) > 0


ROW_KERNELS = {
    "forward": (gated_residual._forward, gated_residual.blocks(1024) | {"PER_CHANNEL": True}, {}),
    "backward": (gated_residual._backward, gated_residual.blocks(1024) | {"PER_CHANNEL": True}, {}),
    "backward, one gate": (gated_residual._backward, gated_residual.blocks(768) | {"PER_CHANNEL": False}, {}),
    "combine": (info_nce._combine, ROW_OPTIONS | {"BLOCK": 128}, {}),
    "query gradient": (tiles.feature_grads, ROW_OPTIONS | {"BLOCK": 512}, {"FIRST": None}),
    "key gradient": (tiles.feature_grads, ROW_OPTIONS | {"BLOCK": 512}, {"INV_GAIN": None, "EXTRA": None}),
    "plain gradient": (
        tiles.feature_grads,
        ROW_OPTIONS | {"BLOCK": 512},
        dict.fromkeys(("INV_GAIN", "EXTRA", "A", "B", "COEF", "INDEX", "FIRST")),
    ),
}


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_row_kernels(kernel, dtype, arch, tmp_path):
    fn, options, constants = ROW_KERNELS[kernel]
    code = sass(fn, dtype, options, constants, arch, tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", code)
    if "ward" in kernel:
        assert "LDG.E.128" in code
        assert "STG.E.128" in code


ALL_KERNELS = {
    "stats": (info_nce._stats, tiles.TILES["half", False].options(1, "ieee", False)),
    "grads": (info_nce._tile_grads, tiles.TILES["half", False].options(1, "ieee", False) | {"GROUP": 8}),
    "sigmoid": (sigmoid_loss._sweep, tiles.TILES["half", False].options(1, "ieee", True) | {"GROUP": 8}),
    "combine": (info_nce._combine, ROW_OPTIONS | {"BLOCK": 128}),
    "gradient": (tiles.feature_grads, ROW_OPTIONS | {"BLOCK": 16}),
    "forward": (gated_residual._forward, gated_residual.blocks(1) | {"PER_CHANNEL": False}),
    "backward": (gated_residual._backward, gated_residual.blocks(1) | {"PER_CHANNEL": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ALL_KERNELS)
def test_sizes_of_one(kernel, tmp_path):
    """A launch makes an integer argument that is 1 a constant of the program."""
    fn, options = ALL_KERNELS[kernel]
    ones = {name: 1 for name in fn.arg_names if name.islower() and name != "start"}
    assert "EXIT" in sass(fn, "bf16", options, ones, 90, tmp_path)


def test_tile_follows_type_size_and_precision():
    def chosen(n, dtype):
        options = tiles.launch_options(
            torch.empty(n, 40, dtype=dtype), torch.empty(4096, 40, dtype=dtype), fuse=True
        )
        return options["BLOCK_M"], options["BLOCK_K"], options["PRECISION"], options["EVEN_K"]

    assert chosen(4096, torch.bfloat16) == (128, 64, "ieee", False)
    assert chosen(64, torch.float16) == (64, 64, "ieee", False)
    assert chosen(4096, torch.float32) == (64, 16, "ieee", False)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert chosen(4096, torch.float32) == (128, 32, "tf32", False)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_gated_linear_residual(dtype, arch, tmp_path):
    options = tiles.TILES["half" if dtype == "bf16" else "ieee", True].options(512, "ieee", True)
    constants = {"GROUP": tiles.GROUP, "PER_CHANNEL": False}
    code = sass(gated_linear_residual._forward, dtype, options, constants, arch, tmp_path)
    assert spills_in_loops(code) == 0
    assert "STG.E.128" in code
    rows = ROW_OPTIONS | {"BLOCK": 512, "PER_ROW": True}
    assert spills_in_loops(sass(gated_linear_residual._scale_rows, dtype, rows, {}, arch, tmp_path)) == 0
