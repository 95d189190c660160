"""Loads the compiled extension once, or keeps the reason why it is not used."""

import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

from vlmkernels._optional import read_object
from vlmkernels._version import __version__

_BUILD = Path(__file__).with_name("_build.json")
_NOT_BUILT = "installed without its C++ extension (no compiler, or VLMKERNELS_NATIVE=0 at build time)"


def _load() -> tuple[ModuleType | None, str]:
    wanted = os.environ.get("VLMKERNELS_NATIVE", "")
    if wanted == "0":
        return None, "VLMKERNELS_NATIVE=0"
    if wanted not in ("", "1"):
        message = f"VLMKERNELS_NATIVE must be 0 or 1, got {wanted!r}: ignored"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    try:
        built = read_object(_BUILD)
        if built is None:
            return None, _NOT_BUILT
        here = {"torch": torch.__version__, "vlmkernels": __version__}
        other = [f"{k} {built.get(k)}, this is {k} {v}" for k, v in here.items() if built.get(k) != v]
        reason = f"the C++ extension was built for {' and '.join(other)}" if other else ""
    except ValueError as error:
        reason = f"{_BUILD} {error}"
    if reason:
        reason += "; reinstall vlmkernels"
    else:
        try:
            return importlib.import_module("vlmkernels._C"), ""
        except Exception as error:  # whatever stops a foreign library must not stop `import vlmkernels`
            if os.environ.get("VLMKERNELS_CPU_ISA"):  # asked for by name, and its kernels may be registered
                raise
            reason = f"the C++ extension does not load: {error}"
    warnings.warn(f"vlmkernels: {reason}. The reference kernels run instead.", RuntimeWarning, stacklevel=2)
    return None, reason


extension, why_not = _load()
