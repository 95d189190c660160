"""`vlmkernels.info()`, and the two environment variables that choose what runs."""

import os
import subprocess
import sys

import pytest

import vlmkernels
from vlmkernels import _native


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_every_op_has_a_row():
    lines = str(vlmkernels.info()).splitlines()
    assert lines[0].split() == ["op", "CPU", "CUDA"]
    named = {line.split()[0] for line in lines[1 : lines.index("")]}
    assert {op for name in vlmkernels.ops.__all__ for op in (name, f"{name}_bwd")} == named


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


@pytest.mark.skipif(not _native._BUILD.exists(), reason="no C++ extension")
def test_an_extension_that_does_not_load_is_one_warning_and_the_reference():
    code = "import sys; sys.modules['vlmkernels._C'] = None; import vlmkernels; print(vlmkernels.info())"
    done = python(code, VLMKERNELS_NATIVE="1", VLMKERNELS_CPU_ISA="", PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: vlmkernels: the C++ extension does not load") == 1
    assert "C++ kernels: the C++ extension does not load" in done.stdout
    assert "C++ (" not in done.stdout
    assert "C++ sweeps" not in done.stdout


def test_an_extension_for_another_torch_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("VLMKERNELS_NATIVE", raising=False)
    monkeypatch.setattr(_native, "_BUILD", tmp_path / "_build.json")
    _native._BUILD.write_text(f'{{"torch": "2.0.0", "vlmkernels": "{vlmkernels.__version__}"}}')
    with pytest.warns(RuntimeWarning, match=r"built for torch 2\.0\.0, this is torch .*; reinstall"):
        extension, reason = _native._load()
    assert extension is None
    assert "built for torch 2.0.0" in reason
