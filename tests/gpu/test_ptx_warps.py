"""Instructions of warps and of memory in the simulator, against what the manual says of each lane."""

import struct

import pytest
import torch

pytest.importorskip("triton")

from .ptx import access, machine, run, tensor
from .ptx.assembly import element, execute, kernel
from .ptx.parse import SIZES, parse
from .test_ptx_opcodes import ROWS

LANES = range(32)


def test_every_instruction_is_tested():
    here = {*tensor.MMA, *tensor.LDMATRIX, *tensor.SHUFFLES, *tensor.REDUCTIONS, *machine.CONTROL}
    here |= {*access.LOADS, *access.STORES, *access.PARAMETERS, *access.ASYNC}
    elsewhere = {"bar.warp.sync", "cp.async.commit_group", "cp.async.wait_group"}  # test_ptx_faults.py
    assert here | elsewhere | set(ROWS) == machine.OPCODES


def places(opcode: str) -> tuple[list, list, list]:
    """Row and column of each element of a, b and c in a function of the lane, as the manual has them."""
    c = [(lambda g, t, i=i: (g + 8 * (i >= 2), 2 * t + i % 2)) for i in range(4)]
    if "m16n8k8" in opcode:
        a = [(lambda g, t, i=i: (g + 8 * (i % 2), t + 4 * (i // 2))) for i in range(4)]
        return a, [(lambda g, t, i=i: (t + 4 * i, g)) for i in range(2)], c
    a = [(lambda g, t, i=i: (g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4))) for i in range(8)]
    return a, [(lambda g, t, i=i: (2 * t + i % 2 + 8 * (i >= 2), g)) for i in range(4)], c


def fragments(matrices: torch.Tensor, at: list) -> torch.Tensor:
    """Registers [elements of 32 bits, threads] of matrices [warps, rows, columns]."""
    per_lane = torch.stack(
        [torch.stack([m[place(i // 4, i % 4)] for place in at]) for m in matrices for i in LANES]
    )
    return per_lane.contiguous().view(torch.int32).T.contiguous()


@pytest.mark.parametrize("opcode", tensor.MMA)
def test_products_of_tensor_cores(opcode):
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[opcode.split(".")[-2]]
    at_a, at_b, at_c = places(opcode)
    depth, warps = len(at_a) * len(at_c) * 2 // 4, 2
    a, b = torch.randn(warps, 16, depth).to(dtype), torch.randn(warps, depth, 8).to(dtype)
    c = torch.randn(warps, 16, 8)
    registers = [fragments(x, at) for x, at in ((a, at_a), (b, at_b), (c, at_c))]
    out = torch.zeros(4, 32 * warps)
    lines, number = [], 0
    for i, x in enumerate(registers):
        for j in range(len(x)):
            lines += [element("%rd1", i, 4), f"ld.global.b32 %r{number}, [%rd1+{4 * 64 * j}];"]
            number += 1
    names = iter(f"%r{i}" for i in range(number))
    groups = [", ".join(next(names) for _ in x) for x in registers]
    lines.append(f"{opcode} {{%r40, %r41, %r42, %r43}}, {', '.join(f'{{{g}}}' for g in groups)};")
    lines += [element("%rd1", 3, 4), *(f"st.global.b32 [%rd1+{256 * j}], %r{40 + j};" for j in range(4))]
    execute("\n".join(lines), *registers, out, threads=32 * warps)
    if dtype == torch.float32:  # ten bits of mantissa enter, the others are cut off
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    want = (a.double() @ b.double() + c).float()
    assert torch.equal(out, fragments(want, at_c).view(torch.float32))


@pytest.mark.parametrize("opcode", tensor.LDMATRIX)
def test_ldmatrix(opcode):
    count, transposed = int(opcode.split(".x")[1][0]), ".trans." in opcode
    warps, rows = 2, 8 * count
    numbers = torch.arange(64 * 8, dtype=torch.int16).view(64, 8)
    order = torch.stack([torch.randperm(64)[:32] for _ in range(warps)])  # a row for each lane
    addresses = (16 * order).int().view(-1)
    out = torch.zeros(count, 32 * warps, dtype=torch.int32)
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    stores = [f"st.global.b32 [%rd2+{4 * 64 * i}], %r{10 + i};" for i in range(count)]
    body = f"""{element("%rd1", 0, 16)}
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1];
        shl.b32 %r5, %r63, 4;
        mov.u32 %r6, fixed;
        add.s32 %r5, %r5, %r6;
        st.shared.v4.b32 [%r5], {{%r1, %r2, %r3, %r4}};
        bar.sync 0;
        {element("%rd1", 1, 4)}
        ld.global.b32 %r7, [%rd1];
        add.s32 %r7, %r7, %r6;
        {opcode} {{{registers}}}, [%r7];
        {element("%rd2", 2, 4)}
        """
    execute(body + "\n".join(stores), numbers, addresses, out, threads=64)
    for warp in range(warps):
        matrices = numbers[order[warp, :rows]].view(count, 8, 8)
        for i in range(count):
            for lane in LANES:
                row, column = lane // 4, 2 * (lane % 4)
                m = matrices[i].T if transposed else matrices[i]
                low, high = m[row, column : column + 2].tolist()
                assert int(out[i, 32 * warp + lane]) == low | high << 16


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The manual's pseudocode of shfl."""
    clamp, segment = c & 31, c >> 8 & 31
    highest = (lane & segment) | (clamp & ~segment & 31)
    lowest = lane & segment
    if mode == "up":
        j = lane - (b & 31)
        found = j >= highest
    elif mode == "down":
        j = lane + (b & 31)
        found = j <= highest
    elif mode == "bfly":
        j = lane ^ (b & 31)
        found = j <= highest
    else:
        j = lowest | (b & 31 & ~segment & 31)
        found = j <= highest
    return (j if found else lane), found


@pytest.mark.parametrize("opcode", tensor.SHUFFLES)
@pytest.mark.parametrize("b", [0, 1, 5, 16, 31, 33])
@pytest.mark.parametrize("c", [0x1F, 0x0, 0x181F, 0x1C1F, 0x1807])
def test_shuffles(opcode, b, c):
    out, found = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = f"""mad.lo.s32 %r1, %r63, 3, 7;
        {opcode} %r2|%p1, %r1, {b}, {c}, -1;
        selp.b32 %r3, 1, 0, %p1;
        {element("%rd1", 0, 4)}
        st.global.b32 [%rd1], %r2;
        {element("%rd2", 1, 4)}
        st.global.b32 [%rd2], %r3;"""
    execute(body, out, found, threads=64)
    for thread in range(64):
        lane, inside = shuffled(opcode.split(".")[2], thread % 32, b, c)
        assert int(out[thread]) == 3 * (thread - thread % 32 + lane) + 7
        assert bool(found[thread]) == inside


def test_shuffles_by_a_register_and_of_some_lanes():
    out = torch.zeros(32, dtype=torch.int32)
    body = f"""xor.b32 %r1, %r63, 9;
        mov.b32 %r4, 0xFFFF;
        setp.lt.s32 %p1, %r63, 16;
        @%p1 shfl.sync.idx.b32 %r2, %r63, %r1, 31, %r4;
        @!%p1 mov.b32 %r2, -1;
        {element("%rd1", 0, 4)}
        st.global.b32 [%rd1], %r2;"""
    execute(body, out)
    assert out.tolist() == [lane ^ 9 for lane in range(16)] + [-1] * 16


@pytest.mark.parametrize("opcode", tensor.REDUCTIONS)
def test_reductions(opcode):
    choose = {"min": min, "max": max, "add": lambda x: (sum(x) + 2**31) % 2**32 - 2**31}[opcode.split(".")[2]]
    values, out = (
        torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32),
        torch.zeros(64, dtype=torch.int32),
    )
    body = f"""{element("%rd1", 0, 4)}
        ld.global.b32 %r1, [%rd1];
        mov.b32 %r2, -1;
        {opcode} %r3, %r1, %r2;
        {element("%rd1", 1, 4)}
        st.global.b32 [%rd1], %r3;"""
    execute(body, values, out, threads=64)
    each = values.view(2, 32).tolist()
    assert out.view(2, 32).tolist() == [[choose(x)] * 32 for x in each]


def registers(kind: str, count: int, start: int = 1) -> str:
    """Of the narrowest kind that holds a value."""
    stem = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}[SIZES[kind]]
    names = ", ".join(f"{stem}{start + i}" for i in range(count))
    return f"{{{names}}}" if count > 1 else names


@pytest.mark.parametrize("kind", access.KINDS)
@pytest.mark.parametrize("vector", access.VECTORS)
def test_loads_and_stores(kind, vector):
    """From global memory to shared memory and back, by every instruction for this type."""
    count = int(vector[1]) if vector else 1
    width = SIZES[kind] * count
    if width > 16:
        assert f"ld.global.{vector}{kind}" not in access.LOADS
        return
    values = torch.randint(0, 256, (64 * width,), dtype=torch.uint8)
    out = torch.zeros_like(values)
    names = registers(kind, count, 10)
    body = f"""{element("%rd1", 0, width)}
        ld.global.{vector}{kind} {names}, [%rd1];
        mul.lo.s32 %r1, %r63, {width};
        mov.u32 %r2, fixed;
        add.s32 %r1, %r1, %r2;
        st.shared.{vector}{kind} [%r1], {names};
        bar.sync 0;
        ld.shared.{vector}{kind} {registers(kind, count, 20)}, [%r1];
        {element("%rd1", 1, width)}
        st.global.{vector}{kind} [%rd1], {registers(kind, count, 20)};"""
    execute(body, values, out, threads=64)
    assert torch.equal(out, values)


def test_narrow_loads_fill_up_with_zeros():
    values, out = torch.full((32,), 0xFF, dtype=torch.uint8), torch.zeros(32, dtype=torch.int16)
    body = f"""{element("%rd1", 0, 1)}
        ld.global.u8 %rs1, [%rd1];
        {element("%rd1", 1, 2)}
        st.global.b16 [%rd1], %rs1;"""
    execute(body, values, out)
    assert out.tolist() == [0xFF] * 32


def test_shared_variables():
    """One with a size and, behind it, one whose size comes with the launch."""
    out = torch.zeros(32, 2, dtype=torch.int32)
    body = f"""shl.b32 %r1, %r63, 2;
        mov.u32 %r2, dynamic;
        add.s32 %r3, %r1, %r2;
        st.shared.b32 [%r3], %r63;
        st.shared.b32 [fixed], %r2;
        ld.shared.b32 %r4, [fixed];
        ld.shared.b32 %r5, [dynamic+20];
        {element("%rd1", 0, 8)}
        st.global.v2.b32 [%rd1], {{%r4, %r5}};"""
    program = parse(kernel(body, 1, shared=32))
    run(program, (1, 1, 1), 32, [struct.pack("<Q", out.data_ptr())], {"A": out}, shared_bytes=128)
    assert out.tolist() == [[32, 5]] * 32


@pytest.mark.parametrize("opcode", sorted(access.PARAMETERS))
def test_parameters(opcode):
    *_, kind = opcode.split(".")
    count, size = (4, 1) if ".v4." in opcode else (1, SIZES[kind])
    out = torch.zeros(32 * 8, dtype=torch.uint8)
    text = kernel("", 1).replace(
        "ld.param.u64 %rd50, [kernel_param_0];",
        f"""ld.param.u64 %rd50, [kernel_param_0];
        {opcode} {registers(kind, count, 10)}, [second+4];
        {element("%rd1", 0, 8)}
        st.global.{"v4." if count > 1 else ""}b{8 * size} [%rd1], {registers(kind, count, 10)};""",
    )
    text = text.replace(
        "(.param .u64 kernel_param_0)", "(.param .u64 kernel_param_0, .param .align 8 .b8 second[16])"
    )
    value = bytes(range(1, 17))
    run(parse(text), (1, 1, 1), 32, [struct.pack("<Q", out.data_ptr()), value], {"A": out})
    taken = value[4 : 4 + size * count]
    assert bytes(out.view(32, 8)[17].tolist()) == taken + bytes(8 - len(taken))


@pytest.mark.parametrize(("opcode", "width"), [(o, w) for o, sizes in access.ASYNC.items() for w in sizes])
def test_asynchronous_copies(opcode, width):
    """Two groups, of which the first is waited for first; some copies bring zeros."""
    values = torch.randint(1, 255, (2, 32 * width), dtype=torch.uint8)
    out = torch.zeros_like(values)
    kind, vector = ("b32", {4: "", 8: "v2.", 16: "v4."}[width])
    names = registers(kind, width // 4, 10)
    fetch = "\n".join(
        f"{opcode} [%r1+{offset}], [%rd1+{32 * width * i}], {width}, %r3;\ncp.async.commit_group;"
        for i, offset in enumerate((0, 512))
    )
    give = "\n".join(
        f"cp.async.wait_group {1 - i};\nld.shared.{vector}{kind} {names}, [%r1+{512 * i}];\n"
        f"st.global.{vector}{kind} [%rd2+{32 * width * i}], {names};"
        for i in range(2)
    )
    body = f"""mul.lo.s32 %r1, %r63, {width};
        mov.u32 %r2, fixed;
        add.s32 %r1, %r1, %r2;
        setp.lt.s32 %p1, %r63, 20;
        selp.b32 %r3, {width}, 0, %p1;
        {element("%rd1", 0, width)}
        {element("%rd2", 1, width)}
        {fetch}
        {give}"""
    execute(body, values, out)
    want = values.clone()
    want[:, 20 * width :] = 0
    assert torch.equal(out, want)
