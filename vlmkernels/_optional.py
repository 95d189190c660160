"""Files that may be absent, foreign or broken: whatever lies in their place, an import goes on."""

import json
import os
import stat
from pathlib import Path
from typing import Any

LIMIT = 2**16  # bytes; those that the library writes have some thousands


def cache_folder() -> Path:
    """Where the library keeps files for this user. OSError where there is no home folder."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # which the XDG specification says to ignore
        root = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(root):
        raise FileNotFoundError("there is no home folder, and XDG_CACHE_HOME names no other")
    return Path(root) / "vlmkernels"


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None for no file; a ValueError says why what is there cannot be read.

    Neither waits (for the writer of a FIFO, say) nor reads more than LIMIT bytes.
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
            raise ValueError(f"it holds a JSON {type(content).__name__}, not an object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    return content
