"""Processes that die by SIGKILL before a chosen change of a file."""

import os
import signal
import sys
from typing import Any

CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def die_before(count: int, folder: str, *more: tuple[Any, str]) -> None:
    """SIGKILL this process before it changes, opens or flushes something in a folder, or calls one of `more`
    (owner, name), the count-th time."""
    left = iter(range(count - 1))

    def tick():
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name):
        original = getattr(owner, name)

        def counted(*arguments):
            tick()
            return original(*arguments)

        setattr(owner, name, counted)

    sys.addaudithook(
        lambda event, arguments: tick() if event in CHANGES and folder in str(arguments) else None
    )
    for owner, name in ((os, "fsync"), *more):
        before(owner, name)
