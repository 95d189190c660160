"""`vlmkernels.info()`, and the two environment variables that choose what runs."""

import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch

import vlmkernels
from vlmkernels import _native
from vlmkernels.ops import WITHOUT_GRADIENTS


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_every_op_has_a_row():
    lines = str(vlmkernels.info()).splitlines()
    assert lines[0].split() == ["op", "CPU", "CUDA"]
    named = {line.split()[0] for line in lines[1 : lines.index("")]}
    backwards = {f"{op}_bwd" for op in vlmkernels.ops.__all__ if op not in WITHOUT_GRADIENTS}
    assert {*vlmkernels.ops.__all__, *backwards} == named


def test_native_0_runs_the_reference_everywhere_on_the_cpu():
    code = "import vlmkernels; i = vlmkernels.info(); print({w['CPU'] for w in i['ops'].values()}, i)"
    done = python(code, VLMKERNELS_NATIVE="0", VLMKERNELS_CPU_ISA="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'reference'}")
    assert "VLMKERNELS_NATIVE=0" in done.stdout


@pytest.mark.skipif(not vlmkernels.info()["cpu"]["instruction set"], reason="no C++ extension")
def test_an_instruction_set_that_does_not_exist_is_an_error():
    done = python("import vlmkernels", VLMKERNELS_CPU_ISA="avx9")
    assert done.returncode != 0
    assert "VLMKERNELS_CPU_ISA must be baseline, avx2 or avx512, got avx9" in done.stderr


@pytest.mark.skipif(not _native._LIBRARY.exists(), reason="no C++ extension")
def test_an_extension_that_does_not_load_is_one_warning_and_the_reference():
    code = "import sys; sys.modules['vlmkernels._C'] = None; import vlmkernels; print(vlmkernels.info())"
    done = python(code, VLMKERNELS_NATIVE="1", VLMKERNELS_CPU_ISA="", PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: vlmkernels: the C++ extension does not load") == 1
    assert "C++ kernels: the C++ extension does not load" in done.stdout
    assert "C++ (" not in done.stdout
    assert "C++ sweeps" not in done.stdout


FOR = f" for torch {torch.__version__}".encode()
TILE = struct.pack("3q", _native.TILE_ROWS, _native.TILE_COLS, _native.TILE_HEADER)


@pytest.mark.skipif(not _native._LIBRARY.exists(), reason="no C++ extension")
@pytest.mark.parametrize(
    ("here", "other", "what"),
    [
        (FOR, b" for torch 2.0.0", f"torch 2.0.0, this is torch {torch.__version__}"),
        (
            b"tile\0" + TILE,
            b"tile\0" + struct.pack("3q", 128, 512, 64),
            "tile (128, 512, 64), this is tile (128, 256, 64)",
        ),
    ],
    ids=["torch", "tile"],
)
def test_a_foreign_extension_is_not_loaded(tmp_path, here, other, what):
    """Its file tells what it was built for; the ops run the reference, and info() says why."""
    package = tmp_path / "vlmkernels"
    shutil.copytree(_native._LIBRARY.parent, package, ignore=shutil.ignore_patterns("__pycache__", "data"))
    library = package / _native._LIBRARY.name
    content = library.read_bytes()
    assert content.count(here) == 1
    library.write_bytes(content.replace(here, other.ljust(len(here), b"\0")))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vlmkernels; i = vlmkernels.info()\n"
        "print({w['CPU'] for w in i['ops'].values()}, i)"
    )
    done = python(code, VLMKERNELS_NATIVE="", VLMKERNELS_CPU_ISA="")
    assert done.returncode == 0, done.stderr
    reason = f"the C++ extension was built for {what}; reinstall"
    assert done.stderr.count(f"RuntimeWarning: vlmkernels: {reason}") == 1
    assert done.stdout.startswith("{'reference'}")
    assert f"C++ kernels: {reason}" in done.stdout
