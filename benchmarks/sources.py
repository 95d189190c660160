"""Which files an op is made of, and their hash: tests speak of sources, wherever and whenever they run."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.measure import ROOT

EXTENSION = ("csrc/**/*.*", "python/**/*.*", "cmake/*", "CMakeLists.txt", "setup.py")


def of_python(op: str, root: Path = ROOT) -> set[Path]:
    """The module of an op, of nn or of a model, and what that imports of the library."""
    found: set[Path] = set()
    waiting = [f"vlmkernels.{home}.{op}" for home in ("ops", "nn", "models")]
    while waiting:
        path = root / (waiting.pop().replace(".", "/") + ".py")
        if path not in found and path.is_file():
            found.add(path)
            waiting += _imports(path, root)
    return found


def _imports(path: Path, root: Path) -> Iterator[str]:
    """The modules that a file imports of the library, and those of ops that it calls as `vlmkernels.<op>`."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"vlmkernels.ops.{node.attr}"] if node.value.id == "vlmkernels" else []
        else:
            continue
        yield from (name for name in names if name.startswith("vlmkernels."))


def of(op: str, root: Path = ROOT) -> set[Path]:
    """What computes an op on a CPU: its Python, and the extension, which is built as one."""
    built = {path for pattern in EXTENSION for path in root.glob(pattern) if path.is_file()}
    return of_python(op, root) | built


def digest(paths: Iterable[Path], root: Path = ROOT, *, also: str = "") -> str:
    """Of the names and contents of files, and of `also`."""
    found = hashlib.sha256(also.encode())
    for path in sorted(paths):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
