"""A static model of products and of losses of rows: the load of their machine code on a multiprocessor.

Instructions are counted in SASS, each pipe has a published rate, and the slowest pipe bounds a turn of a loop
from below. The model ranks tiles and rejects those that spill. It predicts no time: latencies, the memory
behind L2, the clock and what a scheduler makes of it are not in it, and no GPU has confirmed it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

import torch
import triton

from .launches import Launch
from .machine_code import TARGETS, Code, machine_code
from .matrix import launches


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a multiprocessor does in a clock."""

    warpgroup: (
        int  # multiplications of 16-bit numbers that a warpgroup instruction starts; half of it in TF32
    )
    tensor: int  # those of the instructions of one warp
    fma: int  # lanes that multiply and add
    alu: int  # lanes that compare, select and add integers
    l2: float  # bytes from L2, where every multiprocessor reads
    special: int = 16  # exponentials and reciprocals
    shared: int = 128  # bytes of shared memory
    issue: int = 4  # instructions of warps


# A100 and H100 whitepapers and the throughput table of the CUDA C++ programming guide. An H100 reaches 62 %
# of its peak by instructions of one warp (Luo et al. 2024, "Benchmarking and Dissecting the NVIDIA Hopper").
RATES = {
    "sm_80": Rates(warpgroup=0, tensor=1024, fma=64, alu=64, l2=5120 / 108),
    "sm_90": Rates(warpgroup=2048, tensor=1280, fma=128, alu=64, l2=5120 / 132),
}
FMA = r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2"
ALU = r"FMNMX|FSEL|FSETP|I?ISETP|IADD|LOP3|SHF|SEL|PRMT|LEA|IMNMX|VIMNMX|F2FP|PLOP3|MOV|IABS"
LANES = 32


def _product(instruction: str) -> tuple[float, bool, bool]:
    """Multiplications of one warp's share, whether in TF32, whether of a warpgroup."""
    shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction) or re.match(
        r"HMMA\.(16)(8)(16|8|4)\.", instruction
    )
    if not shape:
        return 0, False, False
    m, n, k = map(int, shape.groups())
    grouped = instruction.startswith("HGMMA")
    return m * n * k / (4 if grouped else 1), "TF32" in instruction, grouped


def _shared_bytes(instruction: str) -> float:
    """Bytes of shared memory that one warp moves."""
    if found := re.match(r"(?:LDSM|STSM)\.16\.MT?88(?:\.(\d))?", instruction):
        return 128 * int(found[1] or 1)
    if found := re.match(r"(?:LDS|STS|LDGSTS)\b(?:.*?\.(64|128)\b)?", instruction):
        return LANES * int(found[1] or 32) / 8
    if instruction.startswith("SHFL"):
        return LANES * 4
    if found := re.match(r"HGMMA\.64x(\d+)x(\d+)\S* R\d+, (\S+)", instruction):
        n, k, first = int(found[1]), int(found[2]), found[3]
        width = 4 if "TF32" in instruction else 2
        return (n + (64 if first.startswith("gdesc") else 0)) * k * width / 4
    return 0


def _global_bytes(instruction: str) -> float:
    found = re.match(r"(?:LDG|LDGSTS)\.E\b(?:.*?\.(64|128)\b)?", instruction)
    return LANES * int(found[1] or 32) / 8 if found else 0


@dataclasses.dataclass(frozen=True)
class Bound:
    """Clocks of a multiprocessor for one turn of one program, by pipe."""

    target: str
    pipes: dict[str, float]
    useful: float  # multiplications that the turn is for
    peak: int  # multiplications a clock of the fastest product instruction there is for the type
    programs: int  # that share the multiprocessor
    warps: int  # of a program
    spills: int  # accesses to spilled registers in loops

    @property
    def pipe(self) -> str:
        return max(self.pipes, key=self.pipes.__getitem__)

    @property
    def clocks(self) -> float:
        """No less is possible, however well the pipes overlap."""
        return self.pipes[self.pipe]

    @property
    def likely(self) -> float:
        """With few warps a scheduler the work of one pipe hides less of the others': a share of their sum."""
        return max(self.clocks, 4 * sum(self.pipes.values()) / max(self.programs * self.warps, 4))

    @property
    def share(self) -> float:
        """Of the peak of products, at most."""
        return self.useful / self.peak / self.clocks

    @property
    def rank(self) -> float:
        return self.useful / self.peak / self.likely


def _pipes(code: Code, weights: dict[int, float]) -> dict[str, float]:
    rates = RATES[code.target]
    out = dict.fromkeys(("tensor", "fma", "alu", "special", "shared", "l2", "issue"), 0.0)
    for i, weight in weights.items():
        x = code.instructions[i]
        weight *= code.warps
        work, tf32, grouped = _product(x)
        out["tensor"] += weight * work * (2 if tf32 else 1) / ((grouped and rates.warpgroup) or rates.tensor)
        out["fma"] += weight * LANES / rates.fma * bool(re.match(FMA, x))
        out["alu"] += weight * LANES / rates.alu * bool(re.match(ALU, x))
        out["special"] += weight * LANES / rates.special * x.startswith("MUFU")
        out["shared"] += weight * _shared_bytes(x) / rates.shared
        out["l2"] += weight * _global_bytes(x) / rates.l2
        out["issue"] += weight / rates.issue
    return out


def _depth(launch: Launch) -> int:
    """Of all products of a tile, one after the other."""
    return launch.arguments["depth"] + launch.arguments.get("width", 0)


def _attention_work(products: Callable[[dict], int]):
    return lambda c, _: c["BLOCK_M"] * c["BLOCK_N"] * products(c)


# Multiplications that one turn is for: a tile of similarities, or a block of keys (of queries) of attention
WORK: dict[str, Callable[[dict, Launch], float]] = {
    **dict.fromkeys(
        (
            "info_nce._stats",
            "_info_nce_bwd._tile_grads",
            "contrastive_distillation._stats",
            "_contrastive_distillation_bwd._tile_grads",
            "sigmoid_loss._sweep",
            "gated_linear_residual._forward",
            "_retrieval._rank",
            "_retrieval._best_matches",
            "retrieval_ranks._count",
        ),
        lambda c, launch: c["BLOCK_M"] * c["BLOCK_N"] * _depth(launch),
    ),
    **dict.fromkeys(
        ("_info_nce_small._grads", "_sigmoid_loss_small._pairs"),
        lambda c, launch: c["BLOCK_M"] * c["BLOCK_N"] * (_depth(launch) + c["BLOCK_D"]),
    ),
    "_attention._forward": _attention_work(lambda c: c["BLOCK_D"] + c["BLOCK_V"]),
    "_attention_bwd._query_grads": _attention_work(lambda c: 2 * c["BLOCK_D"] + c["BLOCK_V"]),
    "_attention_bwd._key_grads": _attention_work(lambda c: 2 * c["BLOCK_D"] + 2 * c["BLOCK_V"]),
}


def _places(launch: Launch, code: Code) -> dict[int, float]:
    """How often each instruction runs in one turn."""
    products = re.compile("HMMA|HGMMA" if launch.config["PRECISION"] != "ieee" or _half(launch) else "FFMA")

    def count(body: Iterable[int]) -> int:
        return sum(products.match(code.instructions[i]) is not None for i in body)

    if not code.innermost:
        return dict.fromkeys(range(len(code.instructions)), 1)
    most = max(count(body) for body in code.innermost)
    inner = min((body for body in code.innermost if 2 * count(body) > most), key=len)  # the least masked
    if "depth" not in launch.arguments:
        return dict.fromkeys(inner, 1)
    around = min(
        (body for body in code.loops if inner < body), key=len, default=range(len(code.instructions))
    )
    once = set(around) - set().union(*(body for body in code.innermost if body < set(around)))
    once = {
        i for i in once if not code.instructions[i].startswith("LDGSTS")
    }  # first turns of the loop's copies
    trips = triton.cdiv(_depth(launch), launch.config["BLOCK_K"])
    return dict.fromkeys(once, 1) | dict.fromkeys(inner, trips)


# Kernels of rows, bound by memory: how often one of their loops turns
TURNS: dict[str, Callable[[dict], int]] = {
    "distillation._forward": lambda x: triton.cdiv(x["classes"], x["BLOCK"]),
    "distillation._backward": lambda x: 1,
    "linear_distillation._offline": lambda x: triton.cdiv(x["classes"], x["BLOCK"]),
    "embedding_distillation._forward": lambda x: triton.cdiv(x["depth"], x["BLOCK_D"]) - 1,
    "embedding_distillation._backward": lambda x: triton.cdiv(x["depth"], x["BLOCK_D"]) - 1,
}


def row_clocks(launch: Launch, code: Code) -> dict[str, float]:
    """Clocks of a multiprocessor for a program of one of TURNS, by pipe."""
    inside, turns = set(code.inside), TURNS[launch.name](launch.arguments)
    return _pipes(code, {i: turns if i in inside else 1 for i in range(len(code.instructions))})


def _half(launch: Launch) -> bool:
    return next(x for n, x in launch.tensors.items() if n in ("Q", "H")).dtype != torch.float32


def bound(launch: Launch, code: Code) -> Bound:
    """The bound of a product kernel (one of WORK) on the target that `code` is for."""
    rates = RATES[code.target]
    peak = rates.warpgroup or rates.tensor
    if not _half(launch):
        peak = rates.fma if launch.config["PRECISION"] == "ieee" else peak // 2
    return Bound(
        code.target, _pipes(code, _places(launch, code)), WORK[launch.name](launch.config, launch), peak,
        code.programs, code.warps, code.count("LDL|STL", code.inside),
    )  # fmt: skip


@functools.cache
def bound_of(workload: str, kernel: str, target: str) -> Bound:
    """That of the first launch of `kernel`, as in "info_nce._stats", in one of WORKLOADS."""
    launch = next(x for x in launches(workload, target) if x.name == kernel)
    return bound(launch, machine_code(launch.compiled(TARGETS[target]), target))
