"""The provider of the matrix products of dense layers on the CPU: our tile products or torch's.

Chosen when the library is imported: from the file that `vlmkernels calibrate` wrote on this machine, else by
CPU vendor and instruction set. Results differ by rounding only.
"""

import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

from vlmkernels import _native
from vlmkernels._files import write_text
from vlmkernels._optional import cache_folder, read_object
from vlmkernels._version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRODUCTS = ("forward", "input", "weight", "few")  # x weight^T; g weight; g^T x; all of few rows
FEW = 50  # rows, of the 128 up to which there are few
SHAPES = ((2048, 768, 3072), (2048, 3072, 768), (512, 1024, 1024))  # rows, inner, outputs
MARGIN = 0.97  # ours is chosen unless torch needs less than this fraction of its time

Choice = dict[str, dict[str, str]]  # dtype -> product -> "own" or "torch"


def cache_file() -> Path:
    """The file of `vlmkernels calibrate`. OSError if there is no home folder."""
    return cache_folder() / "calibration.json"


def machine() -> dict[str, str]:
    """What a stored choice is valid for."""
    build = _native.extension.build() if _native.extension is not None else {}
    return {
        "cpu": cpu_name(),
        "instruction set": build.get("isa", ""),
        "tile products": build.get("tile_gemm", ""),
        "torch": torch.__version__,
        "vlmkernels": __version__,
    }


def cpu_name() -> str:
    """Vendor, model name and numbers of family and model, as reported by the system."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or not readable
        text = ""
    fields = ("vendor_id", "model name", "cpu family", "model")
    found = [re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE) for field in fields]
    return (
        " ".join(match[1].strip() for match in found if match) or platform.processor() or platform.machine()
    )


def by_rule() -> tuple[Choice, str]:
    """Without a calibration: ours if tile products use micro-kernels on an AMD CPU with AVX-512; in bfloat16
    also with AVX2 where torch has no fast product."""
    here = machine()
    name = here["tile products"]
    if os.environ.get("VLMKERNELS_CPU_ISA"):
        return all_products("own"), "VLMKERNELS_CPU_ISA is set"
    if not name.startswith("oneDNN"):
        return all_products("torch"), "no micro-kernels for tile products here"
    if here["cpu"].startswith("AuthenticAMD") and here["instruction set"] == "avx512":
        choice = all_products("own")
        if "bfloat16" not in name:
            choice["bfloat16"] = all_products("torch")["bfloat16"]
        choice["bfloat16"]["few"] = "torch"  # the weight would be packed for each call
        return choice, "AMD with AVX-512"
    if here["instruction set"] == "avx2" and not torch_multiplies_bf16():
        choice = {**all_products("torch"), "bfloat16": all_products("own")["bfloat16"]}
        return choice, "AVX2, where torch has no fast products in bfloat16"
    return all_products("torch"), f"no rule for {here['cpu']} with {here['instruction set']}"


def torch_multiplies_bf16() -> bool:
    """Whether torch hands products in bfloat16 to oneDNN; else it multiplies number by number."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def all_products(provider: str) -> Choice:
    return {dtype: dict.fromkeys(PRODUCTS, provider) for dtype in DTYPES}


def read(path: Path) -> Choice | None:
    """The choice stored for this machine, library and torch, None if there is no file.

    A ValueError says why a file cannot be used.
    """
    stored = read_object(path)
    if stored is None:
        return None
    was = stored.get("machine")
    if not isinstance(was, dict):
        raise ValueError("has no machine")
    other = [f"{k} {was.get(k)!r}, here {v!r}" for k, v in machine().items() if was.get(k) != v]
    if other:
        raise ValueError(f"was written for another machine or version: {'; '.join(other)}")
    try:
        choice = {d: {p: stored["choice"][d][p] for p in PRODUCTS} for d in DTYPES}
    except (KeyError, TypeError):
        raise ValueError("has no entry for every product") from None
    if any(p not in ("own", "torch") for products in choice.values() for p in products.values()):
        raise ValueError("has entries other than 'own' and 'torch'")
    return choice


def apply(choice: Choice) -> None:
    choose = getattr(_native.extension, "choose_torch_products", None)
    if choose is None:
        return
    for dtype, products in choice.items():
        choose(dtype, *(products[p] == "torch" for p in PRODUCTS))


def load() -> tuple[Choice, str]:
    """Chooses at import; returns the choice and the reason."""
    choice, why = by_rule()
    if not os.environ.get("VLMKERNELS_CPU_ISA"):
        try:
            path = cache_file()
            measured = read(path)
            if measured is not None:
                choice, why = measured, f"measured: {path}"
        except OSError as error:
            why += f"; {error}"
        except ValueError as error:
            why += f"; {path} {error}"
    apply(choice)
    return choice, why


def summary() -> str:
    """For info(): the provider of each product, and why."""
    if _native.extension is None:
        return ""
    names = ["; ".join(f"{d} {p}: {CHOICE[d][p]}" for p in PRODUCTS) for d in DTYPES]
    if len({provider for products in CHOICE.values() for provider in products.values()}) == 1:
        names = [CHOICE["float32"]["forward"]]
    why = WHY.encode(errors="backslashreplace").decode()  # a path need not be Unicode
    return f"{'; '.join(names)} ({why})"


def measure(rounds: int = 7) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of every product, ours and torch's in alternation: dtype -> product -> "own" and "torch".

    The best of the rounds counts, summed over some shapes.
    """
    if _native.extension is None:
        raise ValueError(f"calibrate requires the compiled extension: {_native.why_not}")
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for name, dtype in DTYPES.items():
            seconds[name] = {p: {"own": 0.0, "torch": 0.0} for p in PRODUCTS}
            for shape in SHAPES:
                for product, best in _best(dtype, shape, rounds).items():
                    for provider, value in best.items():
                        seconds[name][product][provider] += value
    finally:
        apply(CHOICE)
    return seconds


def _best(dtype: torch.dtype, shape: tuple[int, int, int], rounds: int) -> dict[str, dict[str, float]]:
    rows, inner, outputs = shape
    shapes = (rows, inner), (outputs, inner), (rows, outputs)
    x, weight, dout = (torch.randn(shape, device="cpu").to(dtype) for shape in shapes)
    ops = torch.ops.vlmkernels

    def few() -> None:
        for n in (1, FEW):
            ops.linear(x[:n], weight, None, None, "none", False)
            ops.linear_bwd(dout[:n], x[:n], weight, None, None, "none", [True, True, False])

    calls = {
        "forward": lambda: ops.linear(x, weight, None, None, "none", False),
        "input": lambda: ops.linear_bwd(dout, None, weight, None, None, "none", [True, False, False]),
        "weight": lambda: ops.linear_bwd(dout, x, weight, None, None, "none", [False, True, False]),
        "few": few,
    }
    best = {p: {"own": float("inf"), "torch": float("inf")} for p in PRODUCTS}
    for _ in range(rounds + 1):  # the first round also compiles the micro-kernels
        for provider in ("own", "torch"):
            apply(all_products(provider))
            for product, call in calls.items():
                start = time.perf_counter()
                call()
                best[product][provider] = min(best[product][provider], time.perf_counter() - start)
    return best


def calibrate() -> tuple[Path, dict[str, Any]]:
    """Measures, chooses for this process and those that import the library later, and writes the file."""
    global CHOICE, WHY
    seconds = measure()
    choice = {
        dtype: {p: "torch" if s["torch"] < MARGIN * s["own"] else "own" for p, s in products.items()}
        for dtype, products in seconds.items()
    }
    path = cache_file()
    stored = {
        "machine": machine(), "threads": torch.get_num_threads(), "choice": choice, "seconds": seconds
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(stored, indent=1))
    CHOICE, WHY = choice, f"measured: {path}"
    apply(choice)
    return path, stored


CHOICE, WHY = load()
