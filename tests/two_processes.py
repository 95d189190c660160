"""Processes of tests: forked from one that has imported what takes long, and two that speak through gloo."""

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["vlmkernels.train.loop", "torch._dynamo", "tests.parity", "tests.peers.preloaded"]
)


def run_two(worker: Callable[..., None], arguments: Sequence[Any]) -> None:
    """``worker(rank, *arguments)`` in two processes."""
    torch.multiprocessing.start_processes(worker, tuple(arguments), nprocs=2, start_method="forkserver")


def on_two_processes(worker: Callable[[int, str], None], folder: Path) -> list[Any]:
    """What ``worker(rank, folder)`` saved in ``folder/rank.pt``, by rank."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    run_two(worker, (str(folder),))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
