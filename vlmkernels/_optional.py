"""Optional files, which may be absent, foreign or damaged without breaking an import."""

import json
import os
import stat
from pathlib import Path
from typing import Any

LIMIT = 2**16  # bytes; files of the library have some thousands


def cache_folder() -> Path:
    """The folder for files of this user. OSError if there is no home folder."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # to be ignored by the XDG specification
        root = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(root):
        raise FileNotFoundError("there is no home folder, and XDG_CACHE_HOME is not set to an absolute path")
    return Path(root) / "vlmkernels"


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no file; a ValueError says why it cannot be read.

    Does not block (on a FIFO, say) and reads at most LIMIT bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("it is not a regular file")
            text = file.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise ValueError(f"it has more than {LIMIT} bytes")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it contains a JSON {type(content).__name__}, not an object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    return content
