"""What the simulator counts, against numbers worked out by hand."""

import pytest
import torch

pytest.importorskip("triton")

from .cases import CASES
from .ptx import Counters, access, counted, tensor
from .ptx.alu import TABLE
from .ptx.assembly import execute
from .ptx.counters import class_of
from .ptx.machine import CONTROL, OPCODES


def count(body: str, *tensors: torch.Tensor, threads: int = 32, grid=(1, 1, 1)) -> Counters:
    counters = Counters()
    execute(body, *tensors, threads=threads, grid=grid, shared=8192, counters=counters)
    return counters


def strided(width: int, stride: int, kind: str = "b32", first: int = 0) -> str:
    """A load of `width` bytes by each lane, `stride` bytes apart."""
    vector = {4: "%r10", 8: "{%r10, %r11}", 16: "{%r10, %r11, %r12, %r13}"}[width]
    name = {4: "", 8: "v2.", 16: "v4."}[width]
    return f"""mul.lo.s64 %rd1, %rd63, {stride};
        add.s64 %rd1, %rd1, %rd50;
        ld.global.{name}{kind} {vector}, [%rd1+{first}];"""


def aligned(size: int) -> torch.Tensor:
    """Zeros from an address divisible by 128."""
    memory = torch.zeros(size + 128, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 128 :][:size]


@pytest.mark.parametrize(
    ("width", "stride", "first", "sectors"),
    [
        (4, 4, 0, 4),  # 128 bytes in a row: 4 sectors of 32
        (4, 4, 16, 5),  # shifted by half a sector
        (4, 8, 0, 8),
        (4, 32, 0, 32),
        (4, 64, 0, 32),
        (4, 0, 0, 1),  # all the same
        (8, 8, 0, 8),
        (16, 16, 0, 16),
        (16, 32, 0, 32),
    ],
)
def test_sectors_of_a_request(width, stride, first, sectors):
    counters = count(strided(width, stride, first=first), aligned(4096))
    assert counters.global_loads.requests == 1
    assert counters.global_loads.sectors == sectors
    assert counters.global_loads.bytes == 32 * width
    assert counters.global_loads.efficiency == width / sectors


def test_masked_lanes_ask_for_nothing():
    body = strided(4, 4).replace("ld.global", "setp.lt.s32 %p1, %r63, 9;\n@%p1 ld.global")
    counters = count(body, aligned(4096), threads=96, grid=(5, 1, 1))
    # the first of three warps alone has lanes, of which nine take two sectors
    assert (counters.global_loads.requests, counters.global_loads.sectors) == (5, 10)
    assert counters.global_loads.bytes == 5 * 9 * 4
    assert counters.instructions["global load"] == 15


def shared(access_: str, stride: int) -> str:
    return f"""mul.lo.s32 %r1, %r63, {stride};
        mov.u32 %r2, fixed;
        add.s32 %r1, %r1, %r2;
        mov.b32 %r10, 0;
        mov.b32 %r11, 0;
        mov.b32 %r12, 0;
        mov.b32 %r13, 0;
        {access_}"""


@pytest.mark.parametrize(
    ("store", "stride", "passes", "ideal"),
    [
        ("st.shared.b32 [%r1], %r10;", 4, 1, 1),
        ("st.shared.b32 [%r1], %r10;", 8, 2, 1),  # every other bank
        ("st.shared.b32 [%r1], %r10;", 128, 32, 1),  # one bank
        ("st.shared.b32 [%r1], %r10;", 132, 1, 1),  # padded by a word
        ("st.shared.b32 [%r1], %r10;", 0, 1, 1),  # one word for all
        ("st.shared.v2.b32 [%r1], {%r10, %r11};", 8, 2, 2),  # 256 bytes
        ("st.shared.v2.b32 [%r1], {%r10, %r11};", 128, 32, 2),
        ("st.shared.v4.b32 [%r1], {%r10, %r11, %r12, %r13};", 16, 4, 4),
        ("st.shared.v4.b32 [%r1], {%r10, %r11, %r12, %r13};", 128, 32, 4),
        (
            "st.shared.v4.b32 [%r1], {%r10, %r11, %r12, %r13};",
            144,
            4,
            4,
        ),  # rows of 128 bytes and 16 of padding
        ("st.shared.v4.b32 [%r1], {%r10, %r11, %r12, %r13};", 80, 4, 4),
        ("st.shared.v4.b32 [%r1], {%r10, %r11, %r12, %r13};", 96, 8, 4),
    ],
)
def test_bank_conflicts(store, stride, passes, ideal):
    counters = count(shared(store, stride), aligned(128))
    assert counters.shared_stores.requests == 1
    assert (counters.shared_stores.passes, counters.shared_stores.ideal) == (passes, ideal)


def test_bank_conflicts_of_halves_copies_and_matrices():
    halves = count(shared("cvt.u16.u32 %rs1, %r10;\nst.shared.b16 [%r1], %rs1;", 2), aligned(128))
    assert (halves.shared_stores.passes, halves.shared_stores.ideal) == (1, 1)  # two lanes a word
    fetch = "cp.async.cg.shared.global [%r1], [%rd50], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;"
    for stride, passes in ((64, 16), (80, 4)):
        load = "bar.sync 0;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r1];"
        counters = count(shared(fetch + load, stride), aligned(128))
        for found in (counters.shared_stores, counters.shared_loads):
            assert (found.requests, found.passes, found.ideal) == (1, passes, 4)
        assert (counters.global_loads.requests, counters.global_loads.sectors) == (1, 1)


def test_instructions_of_warps():
    body = """mov.b32 %r1, 0;
        $loop:
        add.s32 %r1, %r1, 1;
        setp.lt.s32 %p1, %r1, 5;
        @%p1 bra $loop;
        setp.lt.s32 %p2, %r63, 40;
        @%p2 ex2.approx.f32 %r2, %r1;
        bar.sync 0;"""
    body += "\nsetp.ge.s32 %p3, %r63, 32;\n@%p3 bra $end;\nnot.b32 %r3, %r1;\n$end:"
    counters = count(body, aligned(128), threads=96, grid=(2, 2, 1))
    warps = 4 * 3
    assert counters.instructions == {
        "parameter load": warps,
        "move": 2 * warps,
        "convert": warps,
        "integer": (5 + 5 + 1 + 1) * warps + 4,  # the last for the first warp of a block
        "branch": (5 + 1 + 1) * warps,  # with the one that is not taken, and ret
        "special": warps,  # the last one has no lane below 40 and still comes to it
        "barrier": warps,
    }


def test_every_instruction_has_a_class():
    classes = {opcode: class_of(opcode) for opcode in OPCODES}
    assert all(classes[opcode] == "tensor" for opcode in tensor.MMA)
    assert all(classes[opcode] == "matrix load" for opcode in tensor.LDMATRIX)
    assert all(classes[opcode] == "async copy" for opcode in access.ASYNC)
    assert {classes[opcode] for opcode in CONTROL} == {"branch", "barrier"}
    assert {classes[opcode] for opcode in TABLE} == {
        "special", "convert", "move", "float32", "float64", "integer", "predicate",
    }  # fmt: skip
    assert classes["fma.rn.f32"] == classes["setp.lt.f32"] == "float32"
    assert classes["mad.wide.s32"] == classes["shl.b64"] == "integer"


def test_a_kernel_issues_the_products_of_its_tiles():
    """70 x 70 similarities of 37 features in bfloat16: whole tiles are multiplied, padding as well."""
    reports = []
    CASES["info_nce, pairs, bfloat16"].run(counted(reports))
    launch, counters = next(x for x in reports if x[0].name == "info_nce._stats")
    config = launch.config
    steps = -(-37 // config["BLOCK_K"])
    columns = -(-70 // config["BLOCK_N"])
    splits = launch.grid[0] // -(-70 // config["BLOCK_M"])
    tiles = -(-70 // config["BLOCK_M"]) * columns
    assert splits <= columns
    assert counters.tensor_fma == tiles * steps * config["BLOCK_M"] * config["BLOCK_N"] * config["BLOCK_K"]
    assert counters.instructions["tensor"] * 16 * 8 * 16 == counters.tensor_fma
    assert counters.global_loads.bytes > 2 * 37 * (70 + 70)
