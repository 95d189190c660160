"""Checkpoints that are whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

FOLDER = "checkpoints"
STATE = "state.pt"
_PARTIAL = ".partial-"


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; folders cannot be opened on Windows and need no flush there."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a partial folder to fill; when the block ends without error it becomes ``folder`` in one rename.

    An earlier ``folder`` is replaced. After an error the partial folder is gone and ``folder`` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(_PARTIAL + folder.name)
    replaced = folder.with_name(_PARTIAL + "old-" + folder.name)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clean(run: Path) -> list[str]:
    """Remove what an interrupted write left in a run folder; returns the names removed."""
    removed = []
    for parent in (run, run / FOLDER):
        for path in sorted(parent.glob(_PARTIAL + "*")) if parent.is_dir() else []:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path.name)
    return removed


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder named ``step-00000123``; ValueError for any other name."""
    name = folder.name
    if not (name.startswith("step-") and name[5:].isdigit()):
        raise ValueError(f"checkpoint: a folder named step-<number> is wanted, got {folder}")
    return int(name[5:])


def checkpoints(run: Path) -> list[Path]:
    """All whole checkpoints of a run, oldest first."""
    folder = run / FOLDER
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()] if folder.is_dir() else []
    return sorted(found, key=step_of)


def save(run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and remove the oldest ones so that ``keep`` remain."""
    target = run / FOLDER / f"step-{step:08d}"
    with whole_folder(target) as partial:
        torch.save(state, partial / STATE)
    for old in checkpoints(run)[:-keep]:
        remove(old)
    return target


def remove(folder: Path) -> None:
    """Remove a checkpoint, renamed first: one that is half removed must not look like a checkpoint."""
    doomed = folder.with_name(_PARTIAL + "old-" + folder.name)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def load(folder: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU. FileNotFoundError if there is none."""
    path = folder / STATE
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {folder} holds no {STATE}")
    return torch.load(path, map_location="cpu", weights_only=True)


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process, in types that torch.load reads safely."""
    version, keys, gauss = random.getstate()
    legacy: Any = numpy.random.get_state()
    name, words, position, has_gauss, cached = legacy
    return {
        "python": [version, list(keys), gauss],
        "numpy": [
            name,
            torch.from_numpy(words.astype("int64")),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` gave."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, words.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` after ``step``: the resumed run writes them again."""
    import json

    if not path.is_file():
        return
    kept = io.StringIO()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] > step:
            break
        kept.write(line + "\n")
    write_file(path, kept.getvalue().encode())
