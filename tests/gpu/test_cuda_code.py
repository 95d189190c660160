"""What nvcc makes of the CUDA C++ kernels: machine code within budgets, PTX in the simulator, a library."""

import ctypes
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from vlmkernels import _native

pytest.importorskip("triton")

from . import cuda, cuda_matrix, cuda_ptx
from .cuda_matrix import TARGETS, changes, faults, measured, read, release
from .sanitizer import Violation
from .trials_cuda import CASES, every_case

if cuda.why_not():
    pytest.skip(cuda.why_not(), allow_module_level=True)
if cuda.find_nvcc() is None:
    pytest.skip("no nvcc on this machine; `make test` installs one", allow_module_level=True)


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_breaks_a_rule(target):
    assert {name: said for name, x in measured(target).items() if (said := list(faults(name, x)))} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_is_that_of_the_budgets(target):
    if release() not in read():
        pytest.skip(f"budgets are those of nvcc {', '.join(read())}, this is {release()}")
    differing = changes(read()[release()][target], measured(target))
    assert differing == [], "\n".join(
        [*differing, "If that is meant: python -m tests.gpu.cuda_matrix --write"]
    )


def test_rules_are_broken_by_what_they_forbid(tmp_path):
    csrc = tmp_path / "csrc"
    for part in ("include", "cuda"):
        shutil.copytree(cuda.CSRC / part, csrc / part)
    header = csrc / "cuda" / "device.cuh"
    header.write_text(header.read_text().replace("struct alignas(sizeof(T) * V) Pack", "struct Pack"))
    kernels = csrc / "cuda" / "gated_residual.cuh"
    kernels.write_text(kernels.read_text().replace("kResident = 4;", "kResident = 8;"))
    said = {name: list(faults(name, x)) for name, x in measured("sm_80", csrc).items()}
    assert said["forward<4, float, float>"] == [
        "loads of [8, 32] bits and stores of [32], wanted [128] and 128"
    ]
    assert any("accesses to spilled registers" in fault for fault in said["backward<8, bf16, bf16>"])
    assert said["forward<1, float, float>"] == said["finish<float>"] == []


def test_a_change_shows_as_a_diff():
    stored = read()["13.0.88"]["sm_80"]
    name = "forward<8, bf16, bf16>"
    other = stored | {name: stored[name]._replace(registers=41)}
    lines = changes(stored, other)
    assert lines[0] == name
    assert [line.split(",")[0] for line in lines[1:]] == ["  - 40 registers", "  + 41 registers"]
    assert changes(stored, stored) == []


@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_simulator(name):
    trial = CASES[name]()
    requests = trial.requests()
    cuda_ptx.run(requests)
    trial.check(requests)


@pytest.mark.slow
def test_kernels_of_all_types_and_sizes_in_the_simulator():
    for trial in every_case():
        requests = trial.requests()
        cuda_ptx.run(requests)
        trial.check(requests)


def test_the_simulator_runs_every_kernel_that_is_compiled():
    launched = set()
    for make in CASES.values():
        for request in make().requests():
            launched |= {launch.kernel for launch in cuda_ptx.recorded(request)[0]}
    ptx = cuda.compiled("ptx", "sm_80").read_text()
    compiled = set(re.findall(r"\.entry\s+(\w+)", ptx))
    assert launched <= compiled
    kinds = {name.partition("<")[0] for name in cuda_matrix.short(sorted(launched))}
    assert kinds == {"forward", "backward", "finish"}


def test_the_simulator_knows_the_bounds_of_the_operands():
    request = CASES["float32, one gate"]().requests()[0]
    request.out = request.out[:-1]
    with pytest.raises(Violation, match="outside"):
        cuda_ptx.run([request])


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="this machine has a CUDA driver")
def test_a_launch_without_a_driver_is_an_error():
    """The bridge linked with the kernels of nvcc, called with CPU tensors."""
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); import vlmkernels\n"
        "x = torch.ones(4, 8)\n"
        "for call in (lambda: vlmkernels.gated_residual(x, x, x[0, :1]),\n"
        "             lambda: torch.ops.vlmkernels.gated_residual_bwd(x, x, x[0], None, [True, True])):\n"
        "    try:\n"
        "        call()\n"
        "    except RuntimeError as error:\n"
        "        print(str(error).splitlines()[0])\n"
        "print(vlmkernels.gated_residual(x[:0], x[:0], x[0, :1]).shape)\n"
    )
    environment = os.environ | {"VLMKERNELS_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, cuda.device()], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    failure = (
        "vlmkernels.gated_residual on CUDA: CUDA driver version is insufficient for CUDA runtime version"
    )
    assert done.stdout.splitlines() == [failure, failure, "torch.Size([0, 8])"]


@pytest.mark.skipif(_native.extension is None, reason=f"no C++ extension: {_native.why_not}")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_info_says_which_kernel_runs():
    """Of an extension that was built without CUDA, and beside a library that has it."""
    code = (
        "import sys, torch\nif sys.argv[1:]: torch.ops.load_library(sys.argv[1])\nimport vlmkernels\n"
        "i = vlmkernels.info(); print([i['ops'][op]['CUDA'].split(' (')[0] for op in\n"
        "('gated_residual', 'gated_residual_bwd', 'gated_linear_residual')]); print(i['notes']['CUDA C++'])"
    )
    for library, names in (([], ["Triton"] * 3), ([cuda.device()], ["CUDA C++", "CUDA C++", "Triton"])):
        done = subprocess.run([sys.executable, "-c", code, *library], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [str(names), "not built: this torch has no CUDA"]


@pytest.mark.slow
def test_the_extension_with_cuda(tmp_path):
    """All of it, for a torch said to have the CUDA of nvcc: it loads, and its kernels are registered."""
    import pybind11

    package = tmp_path / "vlmkernels"
    shutil.copytree(cuda.ROOT / "vlmkernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    folder = os.path.dirname(torch.__file__)
    build = cuda.ROOT / "build" / "cmake-cuda"
    options = {
        "TORCH_CUDA": release(), "TORCH_DIR": folder, "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(), "VLMK_VERSION": _native.__version__,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package, "NVCC": cuda.find_nvcc(),
    }  # fmt: skip
    tools = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=tools)
    configure = [
        cmake,
        "-S",
        cuda.ROOT,
        "-B",
        build,
        "-G",
        "Ninja",
        *(f"-D{k}={v}" for k, v in options.items()),
    ]
    for command in (configure, [cmake, "--build", build, "--target", "_C"]):
        done = subprocess.run(command, env=os.environ | {"PATH": tools}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    code = "import vlmkernels; print(vlmkernels.__file__); print(vlmkernels.info())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(package / "__init__.py")
    assert sum("CUDA C++ (sm_75, sm_80, sm_90, sm_100, sm_120)" in line for line in lines) == 2
    assert not any("not built" in line for line in lines)
