"""Compiled kernels keep to their budgets and to the rules, and the tools that say so see what they must."""

import dataclasses
import functools
import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

import triton

from vlmkernels.triton import _attention, _attention_bwd
from vlmkernels.triton import _contrastive_distillation_bwd as distilled_bwd
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton import contrastive_distillation as distilled

from . import matrix
from .cases import CASES
from .machine_code import TARGETS, Code, machine_code, parse_amdgcn, parse_sass
from .model import bound
from .ranking import SWEEPS, measure
from .test_cases import kernels
from .workloads import WORKLOADS

TABLES = {
    "pairwise": (tiles.TILES, tiles.PRODUCTS_ON),
    "statistics": (tiles.TILES, tiles.STATISTICS_ON),
    "statistics of two": (distilled.STATS, distilled.STATS_ON),
    "gradients of two": (distilled_bwd.GRADS, distilled_bwd.GRADS_ON),
    "forward": (_attention.FORWARD, _attention.FORWARD_ON),
    "query": (_attention_bwd.QUERY_GRADS, _attention_bwd.QUERY_GRADS_ON),
    "key": (_attention_bwd.KEY_GRADS, _attention_bwd.KEY_GRADS_ON),
}
SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_3:
        /*0010*/                   LDL R2, [R1] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_4) ;
.L_x_2:
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   BRA.U UP0, `(.L_x_3) ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/                   EXIT ;
.L_x_4:
        /*0080*/                   NANOSLEEP 0x20 ;
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*00a0*/                   BRA `(.L_x_5);
        /*00b0*/                   NOP ;
"""
AMDGCN = """
kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
\t.section .rodata
\ts_branch .LBB0_1
"""


def code(target="sm_80", **changes) -> Code:
    parts = {"instructions": (), "loops": (), "registers": 64, "spilled": 0, "shared": 0, "warps": 4}
    return Code(target=target, tensor_memory=0, **(parts | changes))


def compiled(workload: str, kernel: str, target="sm_80"):
    launch = next(x for x in matrix.launches(workload, target) if x.name == kernel)
    return launch, machine_code(launch.compiled(TARGETS[target]), target)


def test_loops_of_sass():
    """Two loops, one in the other with a part out of line; what follows them is in none, nor is the end."""
    instructions, loops = parse_sass(SASS)
    assert instructions[3] == "BRA `(.L_x_4)"
    assert sorted(map(sorted, loops)) == [[1, 2, 3, 4, 5, 8, 9], [2, 3, 4, 8, 9]]
    parsed = code(instructions=instructions, loops=loops)
    assert [sorted(body) for body in parsed.innermost] == [[2, 3, 4, 8, 9]]
    assert (parsed.count("LDL|STL"), parsed.count("LDL|STL", parsed.inside)) == (2, 1)


def test_loops_of_amdgcn():
    instructions, loops = parse_amdgcn(AMDGCN)
    assert len(instructions) == 4
    assert [sorted(body) for body in loops] == [[1, 2]]


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "programs"),
    [
        ("sm_80", 32, 4, 0, 16),  # warps
        ("sm_80", 255, 4, 0, 2),  # registers, by 256 a warp
        ("sm_80", 129, 8, 0, 1),
        ("sm_80", 128, 8, 0, 2),
        ("sm_80", 16, 1, 0, 32),  # programs
        ("sm_80", 64, 4, 48 << 10, 3),  # shared memory and 1 KiB of each program
        ("sm_90", 64, 4, 72 << 10, 3),
        ("sm_120", 32, 4, 0, 12),
        ("sm_120", 64, 4, 48 << 10, 2),
        ("gfx942", 128, 4, 0, 4),
        ("gfx942", 130, 4, 16 << 10, 3),
        ("gfx942", 64, 4, 33 << 10, 1),
    ],
)
def test_programs_on_a_multiprocessor(target, registers, warps, shared, programs):
    assert code(target, registers=registers, warps=warps, shared=shared).programs == programs


def with_instruction(old: Code, text: str, inside: bool) -> Code:
    at = min(old.innermost[0]) if inside else 0
    return dataclasses.replace(old, instructions=(*old.instructions[:at], text, *old.instructions[at + 1 :]))


def without(old: Code, pattern: str) -> Code:
    kept = ["NOP" if old.count(pattern, [i]) else x for i, x in enumerate(old.instructions)]
    return dataclasses.replace(old, instructions=tuple(kept))


def test_rules_see_each_fault(monkeypatch):
    monkeypatch.setattr(matrix, "BUDGETED", (triton.__version__,))
    launch, right = compiled("info_nce bf16 small", "info_nce._stats", "sm_90")

    def found(wrong: Code) -> list[str]:
        return list(matrix.faults(launch, wrong))

    assert found(right) == []
    assert found(with_instruction(right, "LDL R2, [R1]", inside=False)) == []
    assert found(with_instruction(right, "LDL R2, [R1]", inside=True)) == [
        "1 accesses to spilled registers in loops"
    ]
    assert found(dataclasses.replace(right, shared=300 << 10)) == [
        "307200 bytes of shared memory, 232448 are there"
    ]
    assert found(dataclasses.replace(right, warps=65)) == ["no multiprocessor holds a program"]
    assert found(without(right, "HGMMA")) == ["a product without tensor cores", "no HGMMA"]
    assert found(without(right, "LDGSTS")) == [
        "no asynchronous copies in a pipelined loop",
        "no access of 16 bytes",
    ]


def test_a_change_shows_as_a_diff(monkeypatch, tmp_path, capsys):
    first = matrix.Row("64x64 4w 3s", 96, 0, 0, 1024, 4, 8, 8, 8)
    wider = first._replace(registers=128, programs=3)
    monkeypatch.setattr(matrix, "BUDGETED", (triton.__version__,))
    monkeypatch.setattr(matrix, "budgets_file", lambda version="": tmp_path / "budgets.json")
    monkeypatch.setattr(matrix, "entries", lambda target: {"info_nce: _stats": target, "sigmoid": target})
    results = [(first, [])] * 4
    monkeypatch.setattr(matrix, "measured", lambda wanted: results)
    assert matrix.check(["sm_80", "sm_90"], store=False) == 1  # nothing is stored yet
    assert matrix.check(["sm_80", "sm_90"], store=True) == 0
    assert len((tmp_path / "budgets.json").read_text().splitlines()) == 10  # a line for each
    assert matrix.check(["sm_80", "sm_90"], store=False) == 0
    results = [(wider, []), (first, [])]
    capsys.readouterr()
    assert matrix.check(["sm_80"], store=False) == 1
    said = capsys.readouterr().out
    assert "sm_80 info_nce: _stats\n  - 64x64 4w 3s             96 registers" in said
    assert "  + 64x64 4w 3s             128 registers" in said
    assert "sigmoid" not in said
    assert "python -m tests.gpu.matrix --write" in said
    results = [(first, []), (first, ["no HGMMA"])]
    assert matrix.check(["sm_90"], store=False) == 1
    assert "sm_90 sigmoid: no HGMMA" in capsys.readouterr().out


@functools.cache
def first_of_each_kernel(target: str) -> dict[str, tuple[str, matrix.Entry]]:
    found: dict[str, tuple[str, matrix.Entry]] = {}
    for name, entry in matrix.entries(target).items():
        found.setdefault(name.rpartition(": ")[2].partition(" ")[0], (name, entry))
    return found


# On two targets in turn; `make test-gpu-full` has every row on every target.
in_turn = pytest.mark.parametrize(
    ("kernel", "target"), list(zip(sorted(kernels()), itertools.cycle(("sm_80", "sm_90")), strict=False))
)


@in_turn
def test_no_kernel_breaks_a_rule(kernel, target):
    assert matrix.measure(first_of_each_kernel(target)[kernel][1])[1] == []


@pytest.mark.skipif(
    triton.__version__ not in matrix.BUDGETED,
    reason=f"budgets are those of Triton {' and '.join(matrix.BUDGETED)}, this is {triton.__version__}",
)
@in_turn
def test_every_kernel_keeps_to_its_budget(kernel, target):
    name, entry = first_of_each_kernel(target)[kernel]
    found, _ = matrix.measure(entry)
    stored = matrix.read()[entry.target]
    assert found == stored.get(name), "\n".join(
        [*matrix.changes(entry.target, stored, stored | {name: found}), "python -m tests.gpu.matrix --write"]
    )


# One or two registers that the older compiler spills; the tiles that it does not spill lack wide accesses.
SCORE = "contrastive_search_score._forward"
SPILLED = {
    ("3.6.0", "sm_80"): {f"contrastive_search bf16: {SCORE}"},
    ("3.6.0", "sm_100"): {f"contrastive_search fp32: {SCORE}"},
}


@pytest.mark.parametrize("version", matrix.BUDGETED)
def test_budgets_are_of_every_kernel_on_every_target(version):
    stored = json.loads(matrix.budgets_file(version).read_text())
    assert set(stored) == set(TARGETS)
    for target, rows in stored.items():
        assert {name.rpartition(": ")[2].partition(" ")[0] for name in rows} == set(kernels())
        spills = {name for name, x in rows.items() if matrix.Row(*x).spills_in_loops}
        assert spills <= SPILLED.get((version, target), set()), target


@pytest.mark.sampled(3)
@pytest.mark.parametrize("target", TARGETS)
def test_budgets_are_of_what_is_compiled(target):
    for version in matrix.BUDGETED:
        rows = json.loads(matrix.budgets_file(version).read_text())[target]
        assert list(rows) == list(matrix.entries(target))


def tile_of(launch) -> tuple[int, ...]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return tuple(launch.config[name] for name in names if name in launch.config)


def test_workloads_use_every_tile():
    """Whole, or cut by a rule that follows the table (warps on AMD, rows and stages with a bias)."""
    used = {
        target: {tile_of(x) for workload in WORKLOADS for x in matrix.launches(workload, target)}
        for target in {*TARGETS}.union(*(exceptions for _, exceptions in TABLES.values()))
    }
    for table, exceptions in TABLES.values():
        for target, entries in {"any": table, **exceptions}.items():
            found = used[target] if target in used else set().union(*used.values())
            for tile in entries.values():
                cut = {tile, (*tile[:-2], tile[-2] // 2, 1)}
                assert cut & found, f"{tile} on {target}"


def test_tile_follows_type_size_and_precision():
    def chosen(n, dtype, target="sm_80", exceptions=tiles.PRODUCTS_ON):
        x = torch.empty(n, 40, dtype=dtype, device="meta")
        with matrix.on(target):
            y = torch.empty(4096, 40, device="meta")
            options = tiles.launch_options(x, y, fuse=True, exceptions=exceptions)
        return tuple(options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PRECISION"))

    assert chosen(4096, torch.bfloat16) == (128, 64, 64, "ieee")
    assert chosen(4096, torch.bfloat16, "sm_90") == (128, 256, 64, "ieee")
    assert chosen(1024, torch.bfloat16, "sm_90") == (64, 64, 64, "ieee")
    assert chosen(4096, torch.bfloat16, "sm_90", tiles.TILES_ON) == (128, 64, 64, "ieee")
    assert chosen(4096, torch.bfloat16, "gfx942") == (128, 64, 64, "ieee")
    assert chosen(64, torch.float16) == (64, 64, 64, "ieee")
    assert chosen(4096, torch.float32) == (64, 64, 16, "ieee")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert chosen(4096, torch.float32) == (128, 64, 32, "tf32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("target", "case"),
    [
        ("sm_120", "interval_attention, bias, heads of 80, float32"),
        ("sm_120", "interval_attention, bias, heads of 16, bfloat16"),
        ("sm_90", "info_nce, large tiles, bfloat16"),
        ("sm_90", "contrastive_distillation, large tiles, bfloat16"),
        ("sm_90", "gated_linear_residual, large tiles, bfloat16"),
        pytest.param("gfx942", "interval_attention, heads of 256, bfloat16", marks=pytest.mark.slow),
    ],
)
def test_tiles_of_single_architectures_are_right(target, case):
    with matrix.on(target):
        CASES[case].run()


def test_rows_of_products_are_padded_to_wide_accesses():
    x = torch.randn(5, 64)
    assert tiles.operand(x) is x
    for narrow in (x[:, :50], x[:, 3:35], x.T[:, :5]):
        padded = tiles.operand(narrow)
        assert padded.shape[1] % 16 == padded.stride(0) % 16 == padded.data_ptr() % 16 == 0
        assert torch.equal(padded[:, : narrow.shape[1]], narrow)
        assert not padded[:, narrow.shape[1] :].any()


def test_model_of_attention():
    """Heads of 64 on an H100 wait for exponentials as long as for products."""
    hopper = bound(*compiled("attention bf16 64", "_attention._forward", "sm_90"))
    assert hopper.pipes["tensor"] == 2 * 128 * 128 * 64 / 2048  # what the products are, in clocks
    assert hopper.pipes["tensor"] < hopper.pipes["special"] < 1.1 * hopper.pipes["tensor"]
    assert hopper.share < 1
    ampere = bound(*compiled("attention bf16 64", "_attention._forward", "sm_80"))
    assert ampere.pipes["tensor"] == hopper.pipes["tensor"]
    assert ampere.useful == hopper.useful / 2  # by a tile of half the size


@pytest.mark.parametrize("width", [64, 72, 128])
def test_forward_of_attention_may_reach_most_of_the_peak_of_an_h100(width):
    """Padded columns are counted as work: of the share of heads of 72, 72 of 128 parts are useful."""
    assert bound(*compiled(f"attention bf16 {width}", "_attention._forward", "sm_90")).share >= 0.8


@pytest.mark.parametrize("width", [72, 88, 104])
def test_rows_of_multiples_of_16_bytes_are_known(width):
    x = torch.empty(2, 50, 4, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    assert _attention.step(x, x) == 8
    assert _attention.step(x, x[..., 1:]) == _attention.step(x, x[..., :-1]) == 1
    assert _attention.step(x.float()) == 4


def test_model_sees_products_that_are_made_twice():
    launch, _ = compiled("attention bf16 64", "_attention._forward")
    narrow = [
        dataclasses.replace(launch, kwargs=launch.kwargs | {"BLOCK_M": 64, "num_warps": warps})
        for warps in (4, 8)
    ]
    once, twice = (bound(x, machine_code(x.compiled(), "sm_80")) for x in narrow)
    assert twice.pipes["tensor"] == 2 * once.pipes["tensor"]
    assert twice.useful == once.useful
    assert twice.rank < once.rank


def test_ranking_rejects_a_tile_that_spills(monkeypatch):
    monkeypatch.setattr(matrix, "BUDGETED", (triton.__version__,))
    sweep = next(x for x in SWEEPS if x.kernel == "_attention_bwd._key_grads" and x.key == (True, 64))
    name, rank, why = measure(SWEEPS.index(sweep), _attention.Tile(128, 128, 4, 2), "sm_80")
    assert (name, rank) == ("128x128 4w 2s", 0)
    assert "spilled registers in loops" in why
    assert measure(SWEEPS.index(sweep), sweep.table()[sweep.key], "sm_80")[1] > 0
