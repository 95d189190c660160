"""Loads the compiled extension once, or keeps the reason why it is not used."""

import json
import os
import warnings
from pathlib import Path

import torch

_BUILD = Path(__file__).with_name("_build.json")


def _load() -> tuple[object | None, str]:
    if os.environ.get("VLMKERNELS_NATIVE", "1") == "0":
        return None, "VLMKERNELS_NATIVE=0"
    if not _BUILD.exists():
        return None, "the package was installed without its C++ extension (no compiler, or VLMKERNELS_NATIVE=0 at build time)"
    built_for = json.loads(_BUILD.read_text())["torch"]
    if built_for != torch.__version__:
        reason = f"the C++ extension was built for torch {built_for}, this is torch {torch.__version__}; reinstall vlmkernels"
    else:
        try:
            from vlmkernels import _C

            return _C, ""
        except Exception as error:  # whatever stops a foreign library from loading must not stop `import vlmkernels`
            reason = f"the C++ extension does not load: {error}"
    warnings.warn(f"vlmkernels: {reason}. The reference kernels run instead.", RuntimeWarning, stacklevel=2)
    return None, reason


extension, why_not = _load()
