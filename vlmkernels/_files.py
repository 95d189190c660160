"""Files: recognised by a stamp; written to a temporary name in the same folder, flushed, then renamed."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

PARTIAL = ".partial-"  # prefix of temporary files and folders


def stamp(file: Path) -> str:
    """Path, time of the last change and size, by which caches know a file; the path alone if it is gone."""
    path = os.path.realpath(file)
    try:
        status = file.stat()
    except OSError:  # the file is reported when it is read
        return f"{path}\0"
    return f"{path}\0{status.st_mtime_ns}\0{status.st_size}"


def digest(file: Path) -> str:
    """The SHA-256 of what a file contains, in hexadecimal."""
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Adds ``path`` to errors of writing in the block; those of a full disk have no file name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file or folder to the disk; folders cannot be opened on Windows and need no flush there."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary name in the folder of ``path`` and rename the result to ``path``."""
    partial = path.with_name(f"{PARTIAL}{path.name}.{os.getpid()}")
    try:
        with named(path):
            write(partial)
            sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomic(path, lambda partial: partial.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text atomically."""
    write_bytes(path, text.encode())
