"""The door to other libraries says why a peer cannot be imported, and opens torchvision beside CPU torch."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import peers


def test_an_absent_peer_has_a_reason():
    assert "no_such_peer" in peers.why_not("no_such_peer")
    with pytest.raises(ImportError, match="'no_such_peer' cannot be imported here: ModuleNotFoundError"):
        peers.load("no_such_peer")
    assert "AttributeError" in peers.why_not("math:no_such_function")


def test_modules_and_attributes():
    assert peers.why_not("math") is None
    assert peers.load("math:sqrt")(4.0) == 2.0


def test_a_short_name():
    here = getattr(torch.nn.functional, "linear_cross_entropy", None)  # not in torch before 2.13
    assert (peers.why_not("linear_cross_entropy") is None) is (here is not None)
    if here is not None:
        assert peers.load("linear_cross_entropy") is here


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_imports_in_a_fresh_process():
    code = "from benchmarks import peers; print(peers.why_not('torchvision'))"
    root = Path(peers.__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True)
    assert out.stdout.strip() == "None"
