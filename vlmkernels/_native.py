"""Loads the compiled extension once, or keeps the reason why it is not used."""

import importlib
import os
import re
import struct
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from vlmkernels._version import __version__

# A stored tile of the kernel of info_nce: rows, columns, bytes of its header. They determine the sizes of
# results, which are the same without the extension. One built with other tiles is not loaded.
TILE_ROWS, TILE_COLS, TILE_HEADER = 128, 256, 64
_LIBRARY = Path(__file__).with_name(f"_C{EXTENSION_SUFFIXES[0]}")
_NOT_BUILT = "installed without its C++ extension (no compiler, or VLMKERNELS_NATIVE=0 at build time)"


def _foreign() -> str:
    """What the extension was built for instead of this library and torch, as recorded in its file."""
    here = {
        "vlmkernels": __version__,
        "torch": torch.__version__,
        "tile": (TILE_ROWS, TILE_COLS, TILE_HEADER),
    }
    content = _LIBRARY.read_bytes()
    found = re.search(rb"vlmkernels (?P<vlmkernels>[^\s\0]+) for torch (?P<torch>[^\s\0]+)\0", content)
    tile = re.search(rb"vlmkernels tile\0(.{24})", content, re.DOTALL)
    if found is None or tile is None:
        return "something else"
    built: dict[str, object] = {name: there.decode() for name, there in found.groupdict().items()}
    built["tile"] = struct.unpack("3q", tile[1])
    return " and ".join(f"{k} {built[k]}, this is {k} {v}" for k, v in here.items() if built[k] != v)


def _load() -> tuple[ModuleType | None, str]:
    wanted = os.environ.get("VLMKERNELS_NATIVE", "")
    if wanted == "0":
        return None, "VLMKERNELS_NATIVE=0"
    if wanted not in ("", "1"):
        message = f"VLMKERNELS_NATIVE must be 0 or 1, got {wanted!r}: ignored"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    if not _LIBRARY.is_file():
        return None, _NOT_BUILT
    try:
        other = _foreign()
        if not other:
            return importlib.import_module("vlmkernels._C"), ""
        reason = f"the C++ extension was built for {other}; reinstall vlmkernels"
    except Exception as error:  # a library that fails to load must not stop `import vlmkernels`
        if os.environ.get("VLMKERNELS_CPU_ISA"):  # requested explicitly, and its kernels may be registered
            raise
        reason = f"the C++ extension does not load: {error}"
    warnings.warn(f"vlmkernels: {reason}. The reference kernels run instead.", RuntimeWarning, stacklevel=2)
    return None, reason


extension, why_not = _load()
