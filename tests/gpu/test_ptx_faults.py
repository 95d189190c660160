"""Faults seeded in PTX, each of which the simulator names with its place in the source."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")


from .cases import CASES
from .ptx import Fault, machine, parse, run, simulated
from .ptx import bound as bound_arguments
from .ptx.assembly import element, execute
from .trials import strided

# Each thread puts its number into shared memory and takes that of the one 32 threads further on.
EXCHANGE = """shl.b32 %r1, %r63, 2;
mov.u32 %r2, fixed;
add.s32 %r1, %r1, %r2;
st.shared.b32 [%r1], %r63;
bar.sync 0;
xor.b32 %r3, %r63, 32;
shl.b32 %r3, %r3, 2;
add.s32 %r3, %r3, %r2;
ld.shared.b32 %r4, [%r3];
mul.wide.u32 %rd1, %r63, 4;
add.s64 %rd1, %rd1, %rd50;
st.global.b32 [%rd1], %r4;
"""
COPY = """shl.b32 %r1, %r63, 4;
mov.u32 %r2, fixed;
add.s32 %r1, %r1, %r2;
mul.wide.u32 %rd1, %r63, 16;
add.s64 %rd2, %rd1, %rd50;
mov.b32 %r5, 16;
cp.async.cg.shared.global [%r1], [%rd2], 0x10, %r5;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
xor.b32 %r3, %r1, 512;
ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3];
add.s64 %rd3, %rd1, %rd51;
st.global.v4.b32 [%rd3], {%r10, %r11, %r12, %r13};
"""


def exchanged(body: str = EXCHANGE) -> torch.Tensor:
    out = torch.zeros(64, dtype=torch.int32)
    execute(body, out, threads=64)
    return out


def copied(body: str = COPY) -> torch.Tensor:
    out = torch.zeros(64, 4)
    execute(body, torch.arange(256.0).view(64, 4), out, threads=64)
    return out


def changed(text: str, old: str, new: str = "") -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def test_without_a_fault():
    assert exchanged().tolist() == [t ^ 32 for t in range(64)]
    assert torch.equal(copied(), torch.arange(256.0).view(2, 32, 4).flip(0).view(64, 4))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bar.sync 0;", "", "race: load without a barrier of what another warp stored (shared memory): 64"),
        ("st.shared.b32 [%r1], %r63;", "", "load of uninitialised memory (shared memory): 64 lanes"),
        ("[%r1], %r63", "[%r1+2], %r63", "misaligned shared store of 4 bytes: 64 lanes"),
        ("[%r1], %r63", "[%r1+1024], %r63", "store outside of shared memory, which has 1024 bytes: 64 lanes"),
        ("[%r3];", "[%r3+896];", "load outside of shared memory, which has 1024 bytes: 32 lanes"),
        ("[%rd1], %r4", "[%rd1+4], %r4", "store outside of every argument: 1 lanes, first thread 63"),
        ("[%rd1], %r4", "[%rd1+1], %r4", "misaligned store of 4 bytes: 64 lanes"),
        ("[%r1], %r63;", "[%r2], %r63;", "race: two lanes of one store differ: 63 lanes"),
        (
            "ld.shared.b32 %r4, [%r3];",
            "ld.shared.b32 %r4, [%r3]; st.shared.b32 [%r1], %r4;",
            "race: store without a barrier to what another warp loaded (shared memory): 64 lanes",
        ),
        ("mul.wide.u32 %rd1, %r63, 4", "mul.wide.u32 %rd1, %r63, 0", "race: two lanes of one store differ"),
    ],
)  # fmt: skip
def test_of_shared_and_global_memory(old, new, said):
    with pytest.raises(Fault, match=re.escape(said)):
        exchanged(changed(EXCHANGE, old, new))


def test_warps_that_store_the_same_are_no_race():
    same = changed(EXCHANGE, "st.shared.b32 [%r1], %r63;", "and.b32 %r6, %r63, 31; mov.b32 %r7, 5;"
                   "shl.b32 %r6, %r6, 2; add.s32 %r6, %r6, %r2; st.shared.b32 [%r6], %r7;")  # fmt: skip
    same = changed(same, "xor.b32 %r3, %r63, 32;", "and.b32 %r3, %r63, 31;")
    assert exchanged(same).tolist() == [5] * 64
    with pytest.raises(Fault, match="race: two lanes of one store differ"):
        exchanged(changed(same, "mov.b32 %r7, 5;", "shr.u32 %r7, %r63, 5;"))
    apart = "setp.lt.u32 %p1, %r63, 32; @%p1 st.shared.b32 [%r6], %r7; @!%p1 st.shared.b32 [%r6], %r8;"
    apart = changed(same, "st.shared.b32 [%r6], %r7;", "mov.b32 %r8, 5;" + apart)
    assert exchanged(apart).tolist() == [5] * 64
    with pytest.raises(Fault, match="race: store without a barrier to what another warp stored"):
        exchanged(changed(apart, "mov.b32 %r8, 5;", "mov.b32 %r8, 6;"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("cp.async.wait_group 0;", "", "load of what cp.async still brings (shared memory): 64 lanes"),
        ("cp.async.wait_group 0;", "cp.async.wait_group 1;", "load of what cp.async still brings"),
        ("cp.async.commit_group;", "", "load of what cp.async still brings"),
        ("cp.async.wait_group 0;\nbar.sync 0;", "bar.sync 0;\ncp.async.wait_group 0;",
         "race: load without a barrier of what another warp stored"),
        ("[%rd2], 0x10", "[%rd2+8], 0x10", "misaligned load of 16 bytes"),
        ("[%rd2], 0x10", "[%rd2+16], 0x10", "load outside of every argument: 1 lanes, first thread 63"),
        ("cp.async.commit_group;", "st.shared.b32 [%r1], %r5; cp.async.commit_group;",
         "store to what cp.async still brings"),
        ("st.global.v4.b32", "cp.async.cg.shared.global [%r1], [%rd2], 0x10, %r5;\nst.global.v4.b32",
         "race: cp.async without a barrier to what another warp loaded"),
    ],
)  # fmt: skip
def test_of_asynchronous_copies(old, new, said):
    with pytest.raises(Fault, match=re.escape(said)):
        copied(changed(COPY, old, new))


def test_asynchronous_copies_of_nothing_are_zeros():
    some = "setp.lt.s32 %p1, %r63, 40;\nselp.b32 %r5, 16, 0, %p1;\nselp.b64 %rd2, %rd2, 0, %p1;"
    body = changed(COPY, "mov.b32 %r5, 16;", some)
    want = torch.arange(256.0).view(64, 4)
    want[40:] = 0
    assert torch.equal(copied(body), want.view(2, 32, 4).flip(0).view(64, 4))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("setp.lt.s32 %p1, %r63, 32;\n@%p1 ret;\nbar.sync 0;", "barrier after threads have exited: 32 lanes"),
        ("setp.lt.s32 %p1, %r63, 16;\n@%p1 bra $over;\nbar.sync 0;\n$over:",
         "divergent barrier: others of the warp are elsewhere: 16 lanes, first thread 16"),
        ("setp.lt.s32 %p1, %r63, 32;\n@%p1 bra $over;\nbar.sync 0;\nbra $end;\n$over:\nbar.sync 0;\n$end:",
         "divergent barrier: other warps wait at another one: 32 lanes"),
        ("setp.lt.s32 %p1, %r63, 40;\n@%p1 shfl.sync.bfly.b32 %r1, %r63, 1, 31, -1;",
         "collective of a warp that part of it does not execute: 24 lanes, first thread 40"),
        ("setp.lt.s32 %p1, %r63, 40;\nmov.b32 %r2, -1;\n@%p1 redux.sync.max.s32 %r1, %r63, %r2;",
         "collective of a warp that part of it does not execute"),
        ("setp.lt.s32 %p1, %r63, 40;\n@%p1 bar.warp.sync -1;",
         "collective of a warp that part of it does not execute"),
        ("shfl.sync.idx.b32 %r1, %r63, 0, 31, 0xF;", "collective of a warp that part of it does not execute"),
        ("mov.u32 %r2, fixed;\n@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];",
         "collective of a warp that part of it does not execute"),
        ("$again:\n@%p1 bra $again;\nbra.uni $again;", "kernel that does not end: 64 lanes"),
        ("$again:\nbra.uni $again;", "kernel that does not end: 64 lanes"),
    ],
)  # fmt: skip
def test_of_control(body, said, monkeypatch):
    monkeypatch.setattr(machine, "LONGEST", 10_000)
    with pytest.raises(Fault, match=re.escape(said)):
        execute("setp.lt.s32 %p1, %r63, 8;\n" + body, torch.zeros(4), threads=64)


def test_threads_meet_again_after_branches_and_loops():
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""mov.b32 %r1, 0;
        and.b32 %r2, %r63, 7;
        $loop:
        add.s32 %r1, %r1, %r2;
        sub.s32 %r2, %r2, 1;
        setp.gt.s32 %p1, %r2, 0;
        @%p1 bra $loop;
        setp.lt.s32 %p2, %r63, 5;
        @%p2 bra $small;
        add.s32 %r1, %r1, 100;
        bra.uni $join;
        $small:
        add.s32 %r1, %r1, 200;
        $join:
        shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
        bar.sync 0;
        {element("%rd1", 0, 4)}
        st.global.b32 [%rd1], %r3;"""
    execute(body, out, threads=64)

    def alone(t):
        return sum(range(t % 8 + 1)) + (200 if t < 5 else 100)

    assert out.tolist() == [alone(t ^ 1) for t in range(64)]


def test_warps_that_come_late_to_a_barrier():
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""setp.lt.s32 %p1, %r63, 32;
        @%p1 bra $first;
        mov.b32 %r1, 5;
        $first:
        bar.sync 0;
        @!%p1 add.s32 %r1, %r1, 2;
        @%p1 mov.b32 %r1, 3;
        {element("%rd1", 0, 4)}
        st.global.b32 [%rd1], %r1;"""
    execute(body, out, threads=64)
    assert out.tolist() == [3] * 32 + [7] * 32
    with pytest.raises(Fault, match="barrier after threads have exited"):
        execute("setp.lt.s32 %p1, %r63, 32;\n@%p1 bar.sync 0;", out, threads=64)


def test_views_and_uninitialised_memory():
    rows = strided(torch.randn(4, 32))  # rows of 39 elements, of which 32 are the view
    body = f"""{element("%rd1", 0, 4)}
        ld.global.b32 %r1, [%rd1];
        {element("%rd2", 1, 4)}
        st.global.b32 [%rd2], %r1;"""
    out = torch.empty(128)
    execute(body, rows, out)
    assert torch.equal(out[:32], rows[0])
    with pytest.raises(Fault, match="load outside the view of A: 4 lanes, first thread 28"):
        execute(changed(body, "[%rd1]", "[%rd1+16]"), rows, out)
    with pytest.raises(Fault, match="store outside the view of B: 16 lanes, first thread 16"):
        execute(body, out, rows[:, :16])
    written = np.zeros(512, bool)
    execute(body, rows, out, fresh={out.data_ptr(): written})
    assert written.tolist() == [True] * 128 + [False] * 384
    execute(body, out, rows, fresh={out.data_ptr(): written})
    with pytest.raises(Fault, match=r"load of uninitialised memory .A.: 1 lanes, first thread 31"):
        execute(changed(body, "[%rd1]", "[%rd1+4]"), out, rows, fresh={out.data_ptr(): written})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("st.global.b32 [%rd1], %r63;", "race: store to what another block stored (A)"),
        ("ld.global.b32 %r1, [%rd1];\nst.global.b32 [%rd1], %r1;", "race: load of what another block stores"),
        ("@%p1 ld.global.b32 %r1, [%rd1];\n@!%p1 st.global.b32 [%rd1], %r63;",
         "race: store to what another block loaded (A)"),
    ],
)  # fmt: skip
def test_races_between_blocks(body, said):
    first = "mov.u32 %r2, %ctaid.x;\nsetp.eq.s32 %p1, %r2, 0;"
    body = "\n".join((element("%rd1", 0, 4), first, body))
    execute(body, torch.zeros(32), grid=(1, 1, 1))
    with pytest.raises(Fault, match=re.escape(said)):
        execute(body, torch.zeros(32), grid=(2, 1, 1))


def test_blocks_begin_with_other_shared_memory():
    first = "mov.u32 %r9, %ctaid.x; setp.eq.s32 %p1, %r9, 0; @%p1 st.shared.b32 [%r1], %r63;"
    body = changed(EXCHANGE, "st.shared.b32 [%r1], %r63;", first)
    apart = "mad.lo.s32 %r8, %r9, 64, %r63; mul.wide.u32 %rd1, %r8, 4;"
    body = changed(body, "mul.wide.u32 %rd1, %r63, 4;", apart)
    with pytest.raises(Fault, match=r"load of uninitialised memory .shared memory.*block \(1, 0, 0\)"):
        execute(body, torch.zeros(128), threads=64, grid=(2, 1, 1))


# Faults in what Triton made of the project's kernels


def launched(case: str, name: str):
    launch = next(x for x in CASES[case].launched() if x.name == name)
    return launch, launch.compiled()


def rerun(launch, binary, text: str) -> None:
    program = parse(text)
    threads, shared = 32 * binary.metadata.num_warps, binary.metadata.shared
    grid, arguments = (launch.grid[0], 1, 1), bound_arguments(launch, program)
    run(program, grid, threads, arguments, launch.tensors, shared_bytes=shared)


@pytest.fixture(scope="module")
def statistics():
    """info_nce's statistics in bfloat16: tiles of tensor cores that cp.async feeds in two stages."""
    launch, binary = launched("info_nce, far rows, bfloat16", "info_nce._stats")
    rerun(launch, binary, binary.asm["ptx"])
    return launch, binary


def without(text: str, pattern: str, which: int) -> str:
    found = list(re.finditer(pattern, text))
    return text[: found[which].start()] + text[found[which].end() :]


def verdict(launch, binary, text: str) -> str:
    with pytest.raises(Fault) as fault:
        rerun(launch, binary, text)
    assert re.search(r"at \w+\.py:\d+, PTX line \d+, block \(\d+, \d+, \d+\)$", str(fault.value))
    return str(fault.value)


def test_each_barrier_dropped(statistics):
    launch, binary = statistics
    text, pattern = binary.asm["ptx"], r"bar\.sync\s+0;"
    count, said = len(re.findall(pattern, text)), []
    for i in range(count):
        try:
            rerun(launch, binary, without(text, pattern, i))
        except Fault as fault:
            said.append(re.split(r": \d+ lanes", str(fault))[0])
    assert count > 20
    assert len(said) >= count - 3  # some stand before the first copy, where nothing needs them
    memory = "(shared memory)"
    assert set(said) >= {
        f"race: load without a barrier of what another warp stored {memory}",
        f"race: store without a barrier to what another warp loaded {memory}",
        f"race: cp.async without a barrier to what another warp loaded {memory}",
    }


def test_a_wait_dropped_or_too_short(statistics):
    launch, binary = statistics
    text = binary.asm["ptx"]
    gone = without(text, r"cp\.async\.wait_group\s+\d+;", 0)
    assert "cp.async still brings" in verdict(launch, binary, gone)
    longer = re.sub(r"(cp\.async\.wait_group\s+)(\d+);", lambda m: f"{m[1]}{int(m[2]) + 2};", text)
    assert "cp.async still brings" in verdict(launch, binary, longer)


def test_a_shifted_address(statistics):
    launch, binary = statistics
    text, pattern = binary.asm["ptx"], r"(ldmatrix\S+ \{[^}]*\}, \[%r\d+)(?:\+(\d+))?\]"
    shifted = re.sub(pattern, lambda m: f"{m[1]}+{int(m[2] or 0) + 8}]", text, count=1)
    assert "misaligned shared load of 16 bytes" in verdict(launch, binary, shifted)


def test_a_dropped_mask(statistics):
    launch, binary = statistics
    text = re.sub(r"@%p\d+ (st\.global)", r"\1", binary.asm["ptx"])
    assert re.match("store outside|race: store", verdict(launch, binary, text))


def test_warps_that_hold_the_same_columns():
    """Rows narrower than a block lie in several warps, which must all have read what one of them replaces."""
    case = CASES["info_nce, low scale, float32"]
    case.run(simulated)
    launch, binary = launched(case.name, "_info_nce_bwd._finish")
    launch.tensors["QUERY_ACC"].normal_()
    launch.tensors["KEY_ACC"].normal_()
    text = binary.asm["ptx"]
    said = verdict(launch, binary, without(text, r"bar\.sync\s+0;", 0))
    assert "race: store without a barrier to what another warp loaded (QUERY_ACC)" in said
    assert "_pairwise.py" in said
