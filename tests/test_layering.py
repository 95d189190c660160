"""The walls of the house: what may include what, and that every op has all its parts."""

import ast
import importlib
import inspect
import os
import re
import subprocess
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch

import vlmkernels
from benchmarks.cases import all_cases
from vlmkernels.ops import FAMILIES, WITHOUT_GRADIENTS
from vlmkernels.train import kinds

ROOT = Path(__file__).parent.parent
OPS = sorted(
    path.stem for path in (ROOT / "vlmkernels" / "ops").glob("*.py") if not path.stem.startswith("_")
)

# Their similarities and positives are those of the losses over pairs.
BUILT_ON = {"retrieval": "pairwise"}

FAMILY = {op: family for family, ops in FAMILIES.items() for op in ops}
# Ops whose kernels are those of their family: one streaming softmax, products of dense layers.
ATTENTION = ["csrc/cpu/attention_forward.cpp", "csrc/cpu/attention_backward.cpp"]
DENSE = ["csrc/cpu/dense.cpp"]
KERNELS = {
    "interval_attention": ATTENTION,
    "perceiver_attention": ATTENTION,
    "linear": DENSE,
    "mlp": DENSE,
    "gated_mlp": DENSE,
}
DIFFERENTIABLE = [op for op in OPS if op not in WITHOUT_GRADIENTS]
BENCHMARKED = {case.op for case in all_cases()}


def test_there_are_ops():
    assert {"gated_residual", "info_nce", "sigmoid_loss"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_all_its_parts(op):
    parts = [
        f"vlmkernels/reference/{op}.py", f"python/{op}.cpp", f"tests/test_{op}.py", f"docs/{op}.md",
        *KERNELS.get(op, [f"csrc/cpu/{op}.cpp"]),
    ]  # fmt: skip
    parts.append(f"vlmkernels/triton/{op}.py")
    assert [part for part in parts if not (ROOT / part).exists()] == []
    assert op in BENCHMARKED


# Files of kernels, ops and bridges that ops of all families may share.
ROOMS = ("vlmkernels/ops/", "vlmkernels/reference/", "vlmkernels/triton/", "csrc/", "python/")
GENERIC = {
    *("vlmkernels/ops/__init__.py", "vlmkernels/reference/__init__.py", "vlmkernels/triton/__init__.py"),
    *("vlmkernels/ops/_ahead.py", "vlmkernels/ops/_sums.py"),
    *(f"vlmkernels/triton/{name}.py" for name in ("_ahead", "_rows", "_tiles")),
    *(f"csrc/cpu/{name}" for name in ("pack.h", "pack.cpp", "registers.h", "simd.h", "vector.h")),
    *(f"csrc/include/vlmkernels/{name}.h" for name in ("cuda", "isa", "pack", "scratch")),
    *(f"csrc/include/vlmkernels/{name}.h" for name in ("tile_gemm", "types")),
    *(f"python/{name}.h" for name in ("bridge", "dtypes", "memory", "need", "tile_gemm")),
    *("csrc/cuda/device.cuh", "python/cuda/stream.h"),
}


def read_by(path: str) -> set[str]:
    """The files of the rooms that a file imports or includes."""
    text = (ROOT / path).read_text()
    if path.endswith(".py"):
        names = imports(ROOT / path)
        names |= {name.rpartition(".")[0] for name in names}
        found = {name.replace(".", "/") + ".py" for name in names}
    else:
        folders = (Path(path).parent.as_posix(), "csrc/include", "csrc/cpu", "csrc/cuda", "python")
        includes = re.findall(r'#include "([^"]+)"', text)
        found = {f"{folder}/{name}" for name in includes for folder in folders}
    found = {os.path.normpath(name) for name in found}
    return {name for name in found if name.startswith(ROOMS) and (ROOT / name).is_file()}


def files_of(op: str) -> set[str]:
    """What an op is made of: the files that carry its name or its family's, and all that these read."""
    named = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*.*")
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and is_named_after(path.stem, op)
    }
    found: set[str] = set()
    while named:
        path = named.pop()
        found.add(path)
        named |= read_by(path) - found
    return found


def is_named_after(stem: str, op: str) -> bool:
    """Whether a file is the op's own, of one of its parts, or of its family."""
    names = [name for name in (*OPS, *FAMILIES) if re.match(rf"_?{name}(_|$)", stem)]
    own = (op, FAMILY[op], BUILT_ON.get(FAMILY[op]))
    return max(names, key=len, default="") in own  # linear_cross_entropy is not one of linear's


def test_every_op_has_a_family():
    assert sorted(FAMILY) == OPS


@pytest.mark.parametrize("op", OPS)
def test_the_files_of_an_op_carry_its_name_or_its_familys(op):
    """`git ls-files '*<op>*' '*<family>*'` shows them, but for what all share and ops that it is made of."""
    strange = {path for path in files_of(op) if not is_named_after(Path(path).stem, op)} - GENERIC
    assert {path for path in strange if Path(path).stem not in OPS} == set()
    measured = importlib.import_module(f"benchmarks.cases.{FAMILY[op]}").CASES
    assert op in {case.op for cases_of in measured for case in cases_of(True, "cpu")}


def test_generic_files_read_nothing_of_a_family():
    assert {path for path in GENERIC if not (ROOT / path).is_file()} == set()
    names = [*FAMILY, *FAMILIES]
    for path in GENERIC - {"vlmkernels/ops/__init__.py", "vlmkernels/reference/__init__.py"}:
        assert not any(name in Path(read).stem for read in read_by(path) for name in names), path


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


def test_parts_of_models_know_no_system():
    """And a system is made of parts, not of others; Flamingo and ViLD have two in them, VisualGPT one."""
    systems = ("align", "asif", "clip", "decoder", "detector", "flamingo", "simvlm", "vild", "virtex")
    systems += ("visualbert", "visualgpt")
    folder, room = ROOT / "vlmkernels" / "models", "vlmkernels.models."
    joined = {"flamingo": {"clip", "decoder"}, "few_shot": {"decoder"}}
    joined |= {"vild": {"align", "clip", "detector"}}
    joined |= {"visualgpt": {"decoder"}, "_visualgpt_layers": {"decoder"}}
    for path in [*folder.glob("parts/*.py"), *folder.glob("[!_]*.py"), *folder.glob("_[!_]*.py")]:
        read = {name.removeprefix(room).split(".")[0].lstrip("_") for name in imports(path) if room in name}
        own = path.stem.lstrip("_").split("_")[0]
        others = {name for name in read for system in systems if name.split("_")[0] == system != own}
        assert others <= joined.get(path.stem, set()), path.name


def test_the_library_does_not_import_its_peers():
    peers = ("torchvision", "open_clip", "transformers", "timm", "open_flamingo", "sentence_transformers")
    peers += ("benchmarks", "tests")
    for path in ROOT.glob("vlmkernels/**/*.py"):
        found = [name for name in imports(path) if name.split(".")[0] in peers]
        assert found == [], f"{path.relative_to(ROOT)} imports {found}"


def test_imports_make_no_loops():
    """Those within functions included: they may wait for what is slow to load, and hide no loop."""
    paths = {}  # of modules, by their names
    for path in ROOT.glob("vlmkernels/**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if path.stem == "__init__" else parts)] = path

    def read(node: ast.AST, package: str) -> set[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return set()
        if isinstance(node, ast.Import):
            return {alias.name for alias in node.names} & paths.keys()
        if isinstance(node, ast.ImportFrom):
            home = resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{home}.{alias.name}" for alias in node.names}
            return {name if name in paths else home for name in names} & paths.keys()
        return set().union(*(read(child, package) for child in ast.iter_child_nodes(node)))

    graph = {}
    for name, path in paths.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        graph[name] = read(ast.parse(path.read_text()), package) - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError


def tensors_of(op: str) -> list[str]:
    arguments = getattr(torch.ops.vlmkernels, op).default._schema.arguments
    return [argument.name for argument in arguments if "Tensor" in str(argument.type)]


@pytest.mark.parametrize("op", OPS)
def test_raw_and_public_ops_take_their_tensors_in_one_order(op):
    raw, public = tensors_of(op), list(inspect.signature(getattr(vlmkernels, op)).parameters)
    assert [name for name in raw if name in public] == [name for name in public if name in raw]
    backward = tensors_of(f"{op}_bwd") if op in DIFFERENTIABLE else []
    assert [name for name in backward if name in raw] == [name for name in raw if name in backward]


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_backward_takes_what_is_needed_as_one_list_of_its_results(op):
    schema = getattr(torch.ops.vlmkernels, f"{op}_bwd").default._schema
    needs = schema.arguments[-1]
    assert (needs.name, needs.N) == ("needs", len(schema.returns))


def test_only_the_registry_talks_to_torch_library():
    """What it defines has a formula of its FLOPs, and refuses derivatives that it does not have."""
    for path in ROOT.glob("vlmkernels/**/*.py"):
        if path.name == "_library.py":
            continue
        ways = ("torch.library", "LIB.", "_C._dispatch", ".impl(", ".define(")
        found = [way for way in ways if way in path.read_text()]
        found += [name for name in imports(path) if name == "vlmkernels._library.LIB"]
        assert found == [], path.relative_to(ROOT)


def test_kernels_in_triton_know_no_ops():
    for path in ROOT.glob("vlmkernels/triton/*.py"):
        assert [name for name in imports(path) if name.startswith("vlmkernels.ops")] == [], path.name


def test_references_stand_alone():
    for path in ROOT.glob("vlmkernels/reference/*.py"):
        others = [
            n
            for n in imports(path)
            if n.startswith("vlmkernels.") and not n.startswith("vlmkernels.reference")
        ]
        assert others == [], path.name


PACKAGE = ROOT / "vlmkernels"
KINDS_FOLDER = PACKAGE / "train" / "kinds"


def files_around_the_kinds() -> list[Path]:
    """Those of train, use, data and the command, without the kinds themselves."""
    found = [path for room in ("train", "use", "data") for path in PACKAGE.glob(f"{room}/**/*.py")]
    return [PACKAGE / "cli.py", *(path for path in found if path.parent != KINDS_FOLDER)]


def literals(path: Path) -> set[str]:
    """The texts of a file, but for docstrings. A help or an error that mentions a word is another text."""
    tree = ast.parse(path.read_text())
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    told = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, places) and is_told(node)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told]
    return {node.value for node in constants if isinstance(node.value, str)}


def is_told(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None


@pytest.mark.parametrize(
    "path", files_around_the_kinds(), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_only_the_kinds_know_a_kind(path):
    """None is chosen by its name, by the type of its model, by its class or by that of its model."""
    every = kinds.every()
    names = {*kinds.KINDS, *(kind.model.model_type for kind in every)}
    assert literals(path) & names == set()
    modules = {kind.model.__module__ for kind in every}
    classes = {f"{home}.{kind.model.__name__}" for kind in every for home in (*modules, "vlmkernels.models")}
    assert imports(path) & (modules | classes) == set()
    assert [name for name in imports(path) if re.search(r"(^|\.)kinds\.\w+\.", name)] == []


def test_every_kind_is_a_file():
    files = {path.stem for path in KINDS_FOLDER.glob("*.py") if not path.stem.startswith("_")}
    assert files == set(kinds.KINDS)
    for name, place in kinds.KINDS.items():
        assert place.startswith(f"vlmkernels.train.kinds.{name}:")


def test_what_uses_models_does_not_train():
    """It asks the kinds, which are imported when they are asked."""
    for path in PACKAGE.glob("use/*.py"):
        found = {name for name in imports(path) if name.startswith("vlmkernels.train")}
        assert found <= {"vlmkernels.train.kinds"}, path.name
    tree = ast.parse((KINDS_FOLDER / "__init__.py").read_text())
    loaded = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not any(name is None or name.startswith("vlmkernels") for name in loaded)


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
