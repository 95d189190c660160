"""Checkpoints that are complete or absent: written to a partial folder, flushed to the disk, then renamed.

Each has the checksum of its content; a lock keeps a second run out of a run's folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from filelock import FileLock, Timeout

from vlmkernels._files import PARTIAL, named, sync, write_text

log = logging.getLogger("vlmkernels.train")
FOLDER = "checkpoints"
STATE = "state.pt"
CHECKSUMS = "sha256sums"
LOCK = ".lock"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class _Digesting:
    """A file whose content is digested while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _write_state(path: Path, state: dict[str, Any]) -> str:
    """Write with torch.save; returns the digest of the file."""
    with open(path, "wb") as file:
        digesting: Any = _Digesting(file)
        try:
            torch.save(state, digesting)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # such as that of a full disk, behind one of torch
                raise error.__context__ from None
            raise
    return digesting.digest.hexdigest()


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a partial folder to fill; when the block ends without error it becomes ``folder`` in one rename.

    It replaces an earlier ``folder``, on Linux in the same rename. After an error the partial folder is
    removed and ``folder`` is unchanged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(PARTIAL + folder.name)
    replaced = folder.with_name(PARTIAL + "old-" + folder.name)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir()
        with named(folder):
            yield partial
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not folder.exists():
        os.rename(partial, folder)
    elif not _exchange(partial, folder):
        os.rename(folder, replaced)
        os.rename(partial, folder)
    sync(folder.parent)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step. False where the system has no such call."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Create the folder and lock it against other runs; the lock of a process ends with it.

    ValueError if it cannot be created or another run uses it. A file system without locks gives a warning.
    """
    file = run / FOLDER / LOCK
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {run} cannot be a run folder: {error}") from error
    held = FileLock(file, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise ValueError(f"out: another run is writing to {run} and has locked {file}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        log.warning("%s cannot be locked (%s): another run in it would not be noticed", run, error.strerror)
    try:
        yield
    finally:
        held.release()


def clean(run: Path) -> list[str]:
    """Remove what an interrupted write left in a run folder; returns the names removed."""
    removed = []
    for parent in (run, run / FOLDER):
        for path in sorted(parent.glob(PARTIAL + "*")) if parent.is_dir() else []:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path.name)
    return removed


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder named ``step-00000123``; ValueError for any other name."""
    name = folder.name
    if not (name.startswith("step-") and name[5:].isdecimal()):
        raise ValueError(f"checkpoint must be a folder named step-<number>, got {folder}")
    return int(name[5:])


def checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    folder = run / FOLDER
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()] if folder.is_dir() else []
    return sorted(found, key=step_of)


def save(run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and remove the oldest ones so that ``keep`` remain."""
    target = run / FOLDER / f"step-{step:08d}"
    with atomic_folder(target) as partial:
        digest = _write_state(partial / STATE, state)
        (partial / CHECKSUMS).write_bytes(_checksums(digest))
    for old in checkpoints(run)[:-keep]:
        remove(old)
    return target


def remove(folder: Path) -> None:
    """Remove a checkpoint, renamed first: one that is half removed must not look like a checkpoint."""
    doomed = folder.with_name(PARTIAL + "old-" + folder.name)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _checksums(digest: str) -> bytes:
    """What ``sha256sum --check`` reads."""
    return f"{digest}  {STATE}\n".encode()


def load(folder: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU. FileNotFoundError if there is none, ValueError if it is damaged.

    Checkpoints written before there were checksums have no "course" and cannot be checked: a warning says so.
    """
    path, sums = folder / STATE, folder / CHECKSUMS
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {folder} contains no {STATE}")
    if sums.is_file() and sums.read_bytes() != _checksums(file_digest(path)):
        raise ValueError(f"checkpoint: {path} is damaged: it does not match the checksum in {CHECKSUMS}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise ValueError(f"checkpoint: {path} is damaged: {error}") from error
    if not sums.is_file():
        if "course" in state:
            raise ValueError(f"checkpoint: {folder} is damaged: {CHECKSUMS} is missing")
        log.warning("%s is of an earlier version and has no checksum: it is read unchecked", folder)
    return state


def load_first(folders: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The first of these checkpoints that is not damaged, with its content; a warning names those before it.

    ValueError if all are.
    """
    faults = []
    for folder in folders:
        try:
            state = load(folder)
        except (OSError, ValueError) as error:
            faults.append(str(error))
            continue
        if faults:
            log.warning("%s; resuming the one before it, %s", "; ".join(faults), folder)
        return folder, state
    raise ValueError(f"resume: no intact checkpoint is left to resume from: {'; '.join(faults)}")


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
    """Restore what :func:`random_state` returned."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, words.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` after ``step``: the resumed run writes them again."""
    if not path.is_file():
        return
    kept = io.StringIO()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            known = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):  # cut or damaged
            continue
        if known:
            kept.write(line + "\n")
    write_text(path, kept.getvalue())
