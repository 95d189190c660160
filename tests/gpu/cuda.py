"""csrc/cuda without a GPU: on the CPU under the host runtime of tests/cpp/cuda, or compiled by nvcc.

What is built stays in build/cuda-tests under a hash of its sources, so that a second run builds nothing.
"""

import ctypes
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILDS = ROOT / "build" / "cuda-tests"
HOST = ROOT / "tests" / "cpp" / "cuda"
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of vlmk::cuda::DType
ORDERS = ("forward", "reverse", "7")  # of the threads of a block; a number is the seed of a random one
SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O0", "-g", "-fsanitize=thread"],
}
RUNTIME = {"plain": [], "address": ["-DVLMK_ASAN"], "thread": ["-DVLMK_TSAN"]}


class Fault(AssertionError):
    """What the host runtime or a sanitizer has said."""


class Call(ctypes.Structure):
    """Call of tests/cpp/cuda/driver.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "backward", "rows", "d", "x_type", "x_stride", "y_type", "y_stride", "gate_type", "per_channel",
            "x", "y", "gate", "row_mask", "out", "dgate", "scratch",
        )
    )  # fmt: skip


@dataclasses.dataclass
class Request:
    """A call of a launcher; `out` and `dgate` take the results. In the backward x is dout and out is dy."""

    backward: bool
    x: Tensor  # [rows, d]
    y: Tensor  # [rows, d]
    gate: Tensor
    row_mask: Tensor | None  # [rows]
    out: Tensor | None  # [rows, d]
    dgate: Tensor | None

    @property
    def buffers(self) -> list[Tensor | None]:
        return [self.x, self.y, self.gate, self.row_mask, self.out, self.dgate]

    def call(self, addresses: Sequence[int]) -> Call:
        types = [TYPES.index(t.dtype) for t in (self.x, self.y, self.gate)]
        sizes = types[0], self.x.stride(0), types[1], self.y.stride(0), types[2]
        return Call(self.backward, *self.x.shape, *sizes, self.gate.numel() > 1, *addresses, 0)


def span(x: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = zip(x.shape, x.stride(), strict=True)
    return x.element_size() * (1 + sum((size - 1) * stride for size, stride in steps))


def find_nvcc() -> str | None:
    """The CUDA compiler of the system, or the one of the pip packages."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    return shutil.which("nvcc") or next(map(str, sorted(packages.glob("cu*/bin/nvcc"))), None)


def _built(name: str, command: Sequence, sources: Sequence[Path], csrc: Path) -> Path:
    """Where `command`, to which the output is added, has put its output; the name says what it is made of."""
    places = {str(csrc): "csrc", str(ROOT): "."}
    spelled = "\n".join(map(str, command))
    for place, word in places.items():
        spelled = spelled.replace(place, word)
    digest = hashlib.sha256(spelled.encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    out = BUILDS / f"{digest.hexdigest()[:16]}-{name}"
    if not out.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILDS) as folder:
            fresh = Path(folder, name)
            done = subprocess.run([*command, "-o", fresh], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            fresh.replace(out)
    return out


def _files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def compiler() -> list[str]:
    return [os.environ.get("CXX", "g++"), "-std=c++20", "-fPIC"]


def why_not() -> str:
    """Why nothing can be built here, empty where it can."""
    return "" if shutil.which(compiler()[0]) else "no C++ compiler on this machine"


def _host_object(name: str, mode: str, flags: Sequence[str], csrc: Path) -> Path:
    """A source of tests/cpp/cuda, which knows nothing of the kernels."""
    source = HOST / f"{name}.cpp"
    command = [*compiler(), *flags, f"-I{csrc}/include", f"-I{HOST}", "-c", source]
    sources = [*_files(csrc / "include"), *HOST.glob("*.h"), source]
    return _built(f"{name}-{mode}.o", command, sources, csrc)


def build(
    mode: str, kernels: Sequence[Path], others: Sequence = (), csrc: Path = CSRC, name: str = ""
) -> Path:
    """`kernels`, CUDA sources, and `others`, objects and options, for the CPU, under the sanitizer `mode`."""
    runtime = _host_object("cuda_host", mode, ["-O1", *RUNTIME[mode]], csrc)
    include = [f"-I{csrc}/include", f"-I{csrc}/cuda", f"-I{HOST}"]
    command = [*compiler(), *include, "-Wall", "-Wno-unknown-pragmas", *SANITIZERS[mode]]
    command += ["-x", "c++", *kernels, "-x", "none", *others, runtime, "-ldl"]
    sources = [*_files(csrc / "include", csrc / "cuda"), *HOST.glob("*.h"), *kernels, runtime]
    sources += [x for x in others if isinstance(x, Path)]
    return _built(name or mode, command, sources, csrc)


def program(mode: str, csrc: Path = CSRC) -> Path:
    """All kernels and the driver that calls their launchers."""
    driver = _host_object("driver", mode, SANITIZERS[mode], csrc)
    return build(mode, sorted(csrc.glob("cuda/*.cu")), [driver], csrc)


def library(csrc: Path = CSRC) -> Path:
    """The same as a library, whose launches can be recorded."""
    driver = _host_object("driver", "plain", SANITIZERS["plain"], csrc)
    return build("plain", sorted(csrc.glob("cuda/*.cu")), [driver, "-shared"], csrc, "driver.so")


def _bridge() -> tuple[Path, list[str]]:
    """python/cuda, which the ops of CPU tensors run as well, and what it is linked with."""
    folder = Path(torch.__file__).parent
    flags = ["-O0", "-Wno-unused-parameter", f"-I{CSRC}/include", f"-I{ROOT}/python/cuda"]
    command = [*compiler(), *flags, "-isystem", f"{folder}/include", "-c", HOST / "bridge.cpp"]
    headers = ROOT.glob("python/*.h")
    sources = [*_files(CSRC / "include", ROOT / "python" / "cuda"), *headers, HOST / "bridge.cpp"]
    return _built("bridge.o", command, sources, CSRC), [f"-L{folder}/lib", "-ltorch_cpu", "-lc10"]


def bridge() -> Path:
    """A library for torch to load: then the ops of CPU tensors run these kernels on the host runtime."""
    glue, links = _bridge()
    return build("plain", sorted(CSRC.glob("cuda/*.cu")), ["-shared", glue, *links], name="bridge.so")


def device() -> Path:
    """The same with what nvcc makes of the kernels: a launch needs a GPU."""
    nvcc, (glue, links) = find_nvcc(), _bridge()
    command = [nvcc, "-std=c++20", "-arch=sm_80", "-shared", "-cudart", "static", "-cudadevrt", "none"]
    command += ["-Xcompiler", "-fPIC", f"-L{Path(nvcc).parents[1]}/lib", f"-I{CSRC}/include"]
    sources = [*_files(CSRC / "include", CSRC / "cuda"), glue]
    return _built("device.so", [*command, *sorted(CSRC.glob("cuda/*.cu")), glue, *links], sources, CSRC)


def compiled(output: str, arch: str, csrc: Path = CSRC) -> Path:
    """What nvcc makes of gated_residual.cu: "ptx" or "cubin" for `arch`, as "sm_80"."""
    command = [find_nvcc(), "-std=c++20", "-O3", f"-arch={arch}", f"-{output}"]
    command += [f"-I{csrc}/include", f"-I{csrc}/cuda", csrc / "cuda" / "gated_residual.cu"]
    return _built(f"{arch}.{output}", command, _files(csrc / "include", csrc / "cuda"), csrc)


def start(*command, order: str = "forward") -> str:
    """What the program prints; `order` is that of the threads of a block."""
    environment = {"VLMK_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise Fault(done.stderr + done.stdout)
    return done.stdout


def run(executable: Path, requests: Sequence[Request], order: str = "forward") -> None:
    """The calls by a program()."""
    with tempfile.TemporaryDirectory() as folder:
        calls, results = Path(folder, "calls"), Path(folder, "results")
        with calls.open("wb") as file:
            for request in requests:
                file.write(request.call([0 if x is None else span(x) for x in request.buffers]))
                for x in request.buffers:
                    file.write(ctypes.c_int64(0 if x is None else x.data_ptr() % 16))
                    if x is not None:
                        file.write(ctypes.string_at(x.data_ptr(), span(x)))
        start(executable, calls, results, order=order)
        with results.open("rb") as file:
            for request in requests:
                for x in (request.out, request.dgate):
                    if x is not None:
                        ctypes.memmove(x.data_ptr(), file.read(span(x)), span(x))
