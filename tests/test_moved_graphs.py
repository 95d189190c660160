"""A graph that was recorded beside the compiled kernels runs without them, and the other way round."""

import json
import os
import subprocess
import sys
import zlib

import pytest
import torch
from torch import nn

import vlmkernels
from tests.fuzz import raw
from tests.fuzz.draw import Draw
from vlmkernels._library import OPS

HERE = vlmkernels.info()["cpu"]["instruction set"] != ""
other_install = pytest.mark.skipif(not HERE, reason="needs the extension, and another process without it")


def shapes() -> dict[str, list]:
    """What every raw op returns for some arguments, the same ones in every process."""
    return {name: [_results(name, seed) for seed in range(25)] for name in OPS}


def _results(name: str, seed: int) -> list:
    arguments = raw.ARGUMENTS[name](Draw(seed + zlib.crc32(name.encode())))
    out = getattr(torch.ops.vlmkernels, name)(*arguments)
    return [[str(t.dtype), list(t.shape)] for t in (out if isinstance(out, tuple) else (out,))]


class Losses(nn.Module):
    """Scale and bias are trained, so that what a backward needs is part of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.bias = nn.Parameter(torch.tensor(-4.0))

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ours = vlmkernels.info_nce(query, key, self.scale, label_smoothing=0.1)
        target = torch.arange(len(query), device=query.device)
        rows = vlmkernels.linear_cross_entropy(self.scale * query, key, target)
        distilled = vlmkernels.contrastive_distillation(query, key, self.scale, key, query, 5.0)
        taught = vlmkernels.linear_distillation(self.scale * query, key, key, query, temperature=2.0)
        return ours, vlmkernels.sigmoid_loss(query, key, self.scale, self.bias), rows, distilled, taught


def features() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(700, 24), torch.randn(700, 24)


def export(path: str) -> None:
    torch.export.save(torch.export.export(Losses(), features(), strict=True), path)


def run(path: str) -> list[float]:
    return [loss.item() for loss in torch.export.load(path).module()(*features())]


def without_kernels(call: str) -> str:
    """The output of a function of this file in a process that has the reference alone."""
    code = f"import json; from tests import test_moved_graphs as here; print(json.dumps(here.{call}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLMKERNELS_NATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@other_install
def test_results_have_the_same_shapes_whoever_computes_them():
    theirs = without_kernels("shapes()")
    assert shapes() == theirs


@pytest.mark.slow
@other_install
def test_exported_losses_move_between_installs(tmp_path):
    here, there = str(tmp_path / "here.pt2"), str(tmp_path / "there.pt2")
    export(here)
    without_kernels(f"export({there!r})")
    wanted = [loss.item() for loss in Losses()(*features())]
    assert run(there) == pytest.approx(wanted, rel=1e-5)
    assert without_kernels(f"run({here!r})") == pytest.approx(wanted, rel=1e-5)
