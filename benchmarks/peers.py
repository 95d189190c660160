"""The one door to other libraries (open_clip, transformers, ...) for tests, benchmarks and the demo.

    clip = peers.load("open_clip")          # the module, or ImportError with the reason
    reason = peers.why_not("open_clip")     # None when it can be imported

Nothing is downloaded: Hugging Face's hub client is put in its offline mode before anything is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

# Short names whose target is not simply a module of that name, written `module:attribute`.
ALIASES = {"linear_cross_entropy": "torch.nn.functional:linear_cross_entropy"}

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_loaded: dict[str, Any] = {}
_reasons: dict[str, str] = {}
_library: torch.library.Library | None = None  # a Library withdraws its operators when it is collected


def load(name: str) -> Any:
    """The peer `name`: a module ("open_clip.loss") or an attribute of one ("torch.nn.functional:gelu").

    Raises ImportError with the reason when it cannot be imported. Both outcomes are kept for the process.
    """
    if name not in _loaded and name not in _reasons:
        try:
            _loaded[name] = _import(ALIASES.get(name, name))
        except (
            Exception
        ) as error:  # a half-installed package raises anything: RuntimeError, OSError, AttributeError
            _reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if name in _reasons:
        raise ImportError(f"peer {name!r} cannot be imported here: {_reasons[name]}")
    return _loaded[name]


def why_not(name: str) -> str | None:
    """Why the peer `name` cannot be imported here, in one line; None when it can."""
    try:
        load(name)
    except ImportError:
        return _reasons[name]
    return None


def _import(target: str) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _declare_torchvision_operators()
    module_name, _, attribute = target.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def _declare_torchvision_operators() -> None:
    """Declares the operators that torchvision's Python code names at import, where its extension cannot load.

    The wheel of the default package index is built against CUDA and its extension does not load with the
    CPU build of torch; `import torchvision` then fails on the missing schemas. With only the schemas it
    imports and reports that it has no compiled operators.
    """
    global _library
    spec = importlib.util.find_spec("torchvision")
    if (
        _library is not None
        or spec is None
        or spec.origin is None
        or _extension_loads(Path(spec.origin).parent)
    ):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library.define(schema)


def _extension_loads(folder: Path) -> bool:
    for path in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
        return True
    return False
