"""Runs of a worker in two gloo processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def on_two_processes(worker: Callable[[int, str], None], folder: Path) -> list[Any]:
    """What ``worker(rank, folder)`` saved in ``folder/rank.pt``, by rank."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
