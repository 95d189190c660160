"""The walls of the house: what may include what, and that every op has all its parts."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.cases import all_cases

ROOT = Path(__file__).parent.parent
OPS = sorted(
    path.stem for path in (ROOT / "vlmkernels" / "ops").glob("*.py") if not path.stem.startswith("_")
)

# Ops whose kernels are not in a file of their name: one streaming softmax serves two of them, products of
# dense layers two more.
ATTENTION = ["csrc/cpu/attention_forward.cpp", "csrc/cpu/attention_backward.cpp"]
DENSE = ["csrc/cpu/linear.cpp"]
KERNELS = {
    "interval_attention": ATTENTION,
    "perceiver_attention": ATTENTION,
    "mlp": DENSE,
    "gated_mlp": DENSE,
}
CUBLAS = {"linear", "mlp", "gated_mlp"}  # ops that run as torch's own on a GPU
BENCHMARKED = {case.op for case in all_cases()}


def test_there_are_ops():
    assert {"gated_residual", "info_nce", "sigmoid_loss"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_all_its_parts(op):
    parts = [
        f"vlmkernels/reference/{op}.py", f"python/{op}.cpp", f"tests/test_{op}.py", f"docs/{op}.md",
        *KERNELS.get(op, [f"csrc/cpu/{op}.cpp"]),
    ]  # fmt: skip
    parts += [] if op in CUBLAS else [f"vlmkernels/triton/{op}.py"]
    assert [part for part in parts if not (ROOT / part).exists()] == []
    assert op in BENCHMARKED


def test_kernels_know_no_framework():
    allowed = ("ATen/cpu/vec/", "torch/headeronly/", "vlmkernels/")
    for path in [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/c*/*.c*")]:
        for include in re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()):
            assert "/" not in include or include.startswith(allowed), f"{path.name} includes {include}"
            assert "omp.h" not in include
        assert "malloc" not in path.read_text(), f"{path.name} allocates"


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_library_does_not_import_its_peers():
    peers = ("torchvision", "open_clip", "transformers", "timm", "open_flamingo", "sentence_transformers")
    peers += ("benchmarks", "tests")
    for path in ROOT.glob("vlmkernels/**/*.py"):
        found = [name for name in imports(path) if name.split(".")[0] in peers]
        assert found == [], f"{path.relative_to(ROOT)} imports {found}"


def test_only_the_registry_talks_to_torch_library():
    for path in ROOT.glob("vlmkernels/**/*.py"):
        if path.name != "_library.py":
            assert "torch.library" not in path.read_text(), path.relative_to(ROOT)


def test_only_the_registry_defines_ops():
    """What it defines has a formula of its FLOPs, and refuses derivatives that it does not have."""
    for path in ROOT.glob("vlmkernels/**/*.py"):
        if path.name != "_library.py":
            assert "LIB.define" not in path.read_text(), path.relative_to(ROOT)


def test_references_stand_alone():
    for path in ROOT.glob("vlmkernels/reference/*.py"):
        others = [
            n
            for n in imports(path)
            if n.startswith("vlmkernels.") and not n.startswith("vlmkernels.reference")
        ]
        assert others == [], path.name


def test_objects_of_an_instruction_set_leak_no_weak_symbol():
    """A weak symbol outside the namespace could be linked in from the wrong instruction set."""
    folders = [folder for folder in ROOT.glob("build/**/vlmk_avx512.dir") if folder.is_dir()]
    if not folders:
        pytest.skip("no build folder with the kernels' objects")
    objects = sorted(folders, key=lambda folder: folder.stat().st_mtime)[-1].glob("**/*.o")
    for path in objects:
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        weak = [
            line
            for line in symbols.splitlines()
            if re.search(r" [WVu] ", line) and "vlmk::avx512" not in line
        ]
        assert weak == [], f"{path.name}: {weak[:3]}"
