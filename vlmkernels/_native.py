"""Loads the compiled extension once, or keeps the reason why it is not used."""

import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

from vlmkernels._version import __version__

_BUILD = Path(__file__).with_name("_build.json")


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("VLMKERNELS_NATIVE", "1") == "0":
        return None, "VLMKERNELS_NATIVE=0"
    if not _BUILD.exists():
        return None, "installed without its C++ extension (no compiler, or VLMKERNELS_NATIVE=0 at build time)"
    here = {"torch": torch.__version__, "vlmkernels": __version__}
    built = json.loads(_BUILD.read_text())
    other = [
        f"{name} {built.get(name)}, this is {name} {here[name]}"
        for name in here
        if built.get(name) != here[name]
    ]
    if other:
        reason = f"the C++ extension was built for {' and '.join(other)}; reinstall vlmkernels"
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
