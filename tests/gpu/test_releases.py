"""The oldest and the newest release of Triton that is supported, each in processes of its own."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

import triton

from . import matrix

SUITES = ["interpreter", "sanitizer", "launches", "cases"]


@pytest.mark.slow
@pytest.mark.parametrize("version", matrix.RELEASES)
def test_everything_keeps_to_its_budget(version):
    command = [sys.executable, "-m", "tests.gpu.matrix", "--check", "--triton", version]
    done = subprocess.run(command, cwd=matrix.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Triton {version}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", [x for x in matrix.RELEASES if x != triton.__version__])
def test_default_cases_with_another_release(version):
    """Numerics, sanitizer and every kernel."""
    environment = matrix.other_release(version)
    show = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.run(show, env=environment, capture_output=True, text=True).stdout.strip() == version
    files = [f"tests/gpu/test_{name}.py" for name in SUITES]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=matrix.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
