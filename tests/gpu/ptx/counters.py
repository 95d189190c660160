"""What a launch did, counted exactly, for models of its time."""

import collections
import dataclasses

import numpy as np

SECTOR, BANKS = 32, 32

_CLASSES = {
    "mma": "tensor", "ldmatrix": "matrix load", "shfl": "shuffle", "redux": "shuffle", "bar": "barrier",
    "bra": "branch", "ret": "branch", "ex2": "special", "rcp": "special", "cvt": "convert", "mov": "move",
    "selp": "move", "prmt": "move", "cvta": "move",
}  # fmt: skip
_TYPES = {"f32": "float32", "f64": "float64", "pred": "predicate"}


def class_of(opcode: str) -> str:
    """The class under which `Counters.instructions` counts an opcode."""
    first, *rest = opcode.split(".")
    if first in ("ld", "st"):
        space = rest[0].replace("param", "parameter")
        return f"{space} {'load' if first == 'ld' else 'store'}"
    if first == "cp":
        return "async copy" if rest[1] in ("ca", "cg") else "async control"
    if opcode == "div.full.f32":
        return "special"
    return _CLASSES.get(first) or _TYPES.get(rest[-1], "integer")


@dataclasses.dataclass
class Traffic:
    """Accesses of warps to global memory: a request is one instruction of one warp."""

    requests: int = 0
    sectors: int = 0  # of 32 bytes, each counted once a request
    bytes: int = 0  # requested by the lanes

    @property
    def efficiency(self) -> float:
        """Share of the sectors' bytes that the lanes requested; above 1 if lanes share them."""
        return self.bytes / (SECTOR * self.sectors) if self.sectors else 1.0


@dataclasses.dataclass
class Wavefronts:
    """Accesses of warps to shared memory, in passes over its 32 banks of 4 bytes."""

    requests: int = 0
    passes: int = 0  # taken
    ideal: int = 0  # without bank conflicts: 128 bytes a pass


@dataclasses.dataclass
class Counters:
    """Counts of one launch, over all blocks. An instruction counts once for each warp that gets to it."""

    instructions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    global_loads: Traffic = dataclasses.field(default_factory=Traffic)  # with those of cp.async
    global_stores: Traffic = dataclasses.field(default_factory=Traffic)
    shared_loads: Wavefronts = dataclasses.field(default_factory=Wavefronts)  # with ldmatrix
    shared_stores: Wavefronts = dataclasses.field(default_factory=Wavefronts)  # with cp.async
    tensor_fma: int = 0  # multiply-adds issued to tensor cores

    def instruction(self, name: str, lanes: np.ndarray | None, warp: np.ndarray) -> None:
        self.instructions[name] += _warps(lanes, warp)

    def tensor(self, fma: int, lanes: np.ndarray | None, warp: np.ndarray) -> None:
        self.tensor_fma += fma * _warps(lanes, warp)

    @staticmethod
    def traffic(of: Traffic, addresses: np.ndarray, width: int, warps: np.ndarray) -> None:
        """Aligned accesses of `width` bytes, at most 32, each in one sector."""
        of.requests += np.unique(warps).size
        of.sectors += np.unique(np.stack((warps, addresses // SECTOR)), axis=1).shape[1]
        of.bytes += addresses.size * width

    @staticmethod
    def wavefronts(of: Wavefronts, addresses: np.ndarray, width: int, threads: np.ndarray) -> None:
        """Accesses of `width` bytes: 32 lanes of a warp share passes, 16 of 8 bytes, 8 of 16 bytes."""
        lanes = min(32, 128 // width)
        words = max(1, width // 4)
        phase = (threads // lanes).repeat(words)
        word = (addresses[:, None] // 4 + np.arange(words)).ravel()
        phase, word = np.unique(np.stack((phase, word)), axis=1)
        phases, at = np.unique(phase, return_inverse=True)
        load = np.bincount(at * BANKS + word % BANKS, minlength=phases.size * BANKS).reshape(-1, BANKS)
        of.requests += np.unique(threads // 32).size
        of.passes += int(load.max(1).sum())
        of.ideal += phases.size


def _warps(lanes: np.ndarray | None, warp: np.ndarray) -> int:
    return int(warp[-1]) + 1 if lanes is None else int(lanes.reshape(-1, 32).any(1).sum())
