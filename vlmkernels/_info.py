"""What runs where: `vlmkernels.info()`."""

import importlib.util
import platform

import torch

from vlmkernels import _calibration, _native, _providers
from vlmkernels._library import KERNELS, OPS, TRITON, WHY_NO_TRITON
from vlmkernels._version import __version__


class Info(dict):
    """What runs where; str() is a readable table."""

    def __str__(self) -> str:
        rows = [("op", *self["devices"]), *((op, *where.values()) for op, where in self["ops"].items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        providers = {f"attention by {name}": where for name, where in self["providers"].items()}
        facts = {**self["versions"], **self["cpu"], **self["notes"], **providers}
        return "\n".join([*table, "", *(f"{name}: {value}" for name, value in facts.items() if value)])


def info() -> Info:
    """Per op and device the kernel that runs here, why a faster one does not, and on what machine.

    Keys: "devices", "ops" (op -> device -> kernel), "versions", "cpu" (instruction set, the provider of tile
    products and the products of linear layers, threads), "notes" (the reasons) and "providers" (of attention
    on CUDA: for which dtypes, head widths and cards each library is used so far, or why it is not).
    """
    build = _native.extension.build() if _native.extension is not None else {}
    devices = ("CPU", "CUDA")
    notes = {"C++ kernels": _native.why_not or "loaded"}
    notes["CUDA C++"] = build.get("why_no_cuda", "") and f"not built: {build['why_no_cuda']}"
    if not torch.cuda.is_available():
        notes["CUDA"] = "no device here" + ("" if torch.version.cuda else "; this torch has no CUDA")
    if not TRITON:
        notes["Triton"] = WHY_NO_TRITON
    faiss = "faiss" if importlib.util.find_spec("faiss") else "faiss, which is not installed"
    notes["approximate search"] = f"{faiss}; only for ASIF(..., search='faiss')"
    ops = {op: {device: KERNELS.get((op, device), "reference") for device in devices} for op in OPS}
    versions = {"vlmkernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    cpu = {
        "instruction set": build.get("isa", ""),
        "tile products": build.get("tile_gemm", ""),
        "products of linear layers": _calibration.summary(),
        "threads": str(torch.get_num_threads()),
    }
    providers = _providers.summary()
    return Info(devices=devices, ops=ops, versions=versions, cpu=cpu, notes=notes, providers=providers)
