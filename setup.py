"""Builds the C++ extension with CMake against the installed torch; without a compiler there is none."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'"(.+)"', (ROOT / "vlmkernels" / "_version.py").read_text())[1]


def wants_native() -> bool:
    if os.environ.get("VLMKERNELS_NATIVE", "1") == "0":
        return False
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return False
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("vlmkernels: no C++ compiler found, building the pure-Python package", file=sys.stderr)
    return compiler is not None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError:
            raise SystemExit(
                "vlmkernels is built against the torch you have, and this build cannot import it.\n"
                "Install torch first, then:\n"
                "    pip install --no-build-isolation .\n"
                "or build the pure-Python package:\n"
                "    VLMKERNELS_NATIVE=0 pip install ."
            ) from None
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        out.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / "cmake"
        configure = [
            f"-DTORCH_DIR={Path(torch.__file__).parent}",
            f"-DTORCH_CUDA={torch.version.cuda or ''}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVLMK_VERSION={VERSION}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
        ]
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # pip's cmake
        env = {**os.environ, "PATH": tools}
        cmake = shutil.which("cmake", path=tools)
        if cmake is None:
            raise SystemExit(
                "vlmkernels needs cmake to build its extension: pip install cmake ninja pybind11"
            )
        subprocess.check_call([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *configure], env=env)
        subprocess.check_call([cmake, "--build", str(build), "--target", "_C"], env=env)


setup(
    ext_modules=[Extension("vlmkernels._C", [])] if wants_native() else [],
    cmdclass={"build_ext": CMakeBuild},
)
